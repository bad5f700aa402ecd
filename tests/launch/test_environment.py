"""The adapter over launchers' variables: what each sets, and the contradictions between them."""

import pytest

from camshaft.environment import Environment, first_host, read_environment
from camshaft.errors import MachineError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
SLURM_ONE_NODE = {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Environment()),
        ({"MASTER_ADDR": "x", "PATH": "/bin"}, Environment()),
        (TORCHRUN, Environment(3, 1, 4, 2, "torchrun", 2)),
        (DEEPSPEED, Environment(1, 1, 2, 2, "deepspeed", 1)),
        (DEEPSPEED | {"RANK": "3", "WORLD_SIZE": "4", "CROSS_SIZE": "2"}, Environment(3, 1, 4, 2, "deepspeed", 2)),
        (SLURM_ONE_NODE, Environment(1, 1, 2, 2, "slurm", 1)),
        (SLURM, Environment(5, 1, 7, 3, "slurm", 2, ("gpu007", 20_000 + (77 * 31) % 12_000))),
        (SLURM | {"MASTER_ADDR": "h", "MASTER_PORT": "5"}, Environment(5, 1, 7, 3, "slurm", 2, ("h", 5))),
        # Two nodes of uneven size, from the one-agent-a-node launcher that srun started.
        (TORCHRUN | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}, Environment(3, 1, 4, 2, "torchrun", 2)),
        # A hand-made environment of one process.
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Environment(launcher="torchrun")),
    ],
)
def test_reads_what_each_launcher_sets(environ, expected):
    assert read_environment(environ) == expected


@pytest.mark.parametrize(
    "environ",
    [
        # A batch script, in which the user runs `camshaft train` itself: no task of srun.
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
        # The shell of salloc, an interactive step.
        SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
    ],
)
def test_a_slurm_batch_script_or_shell_is_no_task(environ):
    assert read_environment(environ).launcher == "none"


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (TORCHRUN | DEEPSPEED, ["TORCHELASTIC_RUN_ID", "CROSS_SIZE", "two launchers"]),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, ["LOCAL_RANK missing"]),
        ({k: v for k, v in DEEPSPEED.items() if k != "RANK"}, ["RANK missing"]),
        ({"WORLD_SIZE": "2"}, ["RANK, LOCAL_RANK", "missing", "WORLD_SIZE"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["LOCAL_RANK", "missing"]),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE missing"]),
        (DEEPSPEED | {"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, ["LOCAL_RANK=2"]),
        (DEEPSPEED | {"RANK": "0"}, ["LOCAL_RANK=1", "RANK=0"]),
        (DEEPSPEED | {"LOCAL_SIZE": "4"}, ["4 ranks on this node", "WORLD_SIZE=2"]),
        (DEEPSPEED | {"RANK": "one"}, ["RANK", "'one'", "whole number"]),
        (DEEPSPEED | {"RANK": "-1"}, ["RANK", "'-1'"]),
        (DEEPSPEED | {"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
        (SLURM_ONE_NODE | {"WORLD_SIZE": "8"}, ["WORLD_SIZE=8", "SLURM_NTASKS=2"]),
        (SLURM_ONE_NODE | {"RANK": "0"}, ["RANK=0", "SLURM_PROCID=1"]),
        (SLURM_ONE_NODE | {"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "SLURM_LOCALID=1"]),
        (SLURM_ONE_NODE | {"SLURM_PROCID": "2"}, ["SLURM_PROCID=2", "SLURM_NTASKS=2"]),
        ({k: v for k, v in SLURM_ONE_NODE.items() if k != "SLURM_LOCALID"}, ["SLURM_LOCALID missing"]),
        # srun starts a torchrun for each GPU: four jobs that each think to be the only one.
        (TORCHRUN | SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, ["SLURM_STEP_NUM_TASKS=8", "once a node"]),
        (DEEPSPEED | {"SLURM_NTASKS": "5"}, ["WORLD_SIZE=2", "SLURM_NTASKS=5"]),
        (
            {k: v for k, v in SLURM.items() if k not in ("SLURM_STEP_TASKS_PER_NODE",)},
            ["SLURM_NTASKS=7", "how many tasks"],
        ),
    ],
)
def test_refuses_what_contradicts_itself_and_names_it(environ, words):
    with pytest.raises(MachineError) as caught:
        read_environment(environ)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_status == 3


def test_several_faults_come_at_once():
    with pytest.raises(MachineError, match=r"RANK=9 .*; LOCAL_RANK=7"):
        read_environment(DEEPSPEED | {"RANK": "9", "LOCAL_RANK": "7"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n[3-5,9],m", "n3"), ("gpu[007-008]-ib", "gpu007-ib"), ("a,b", "a"), ("", "")],
)
def test_first_host_of_a_slurm_list(hosts, first):
    assert first_host(hosts) == first


def test_reading_the_environment_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, camshaft.distributed as d; d.read_environment({}); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
