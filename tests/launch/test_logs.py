"""Messages: whose are shown, at which level, and that nothing is left behind."""

import logging

from camshaft.cli.launch.logs import messages


def test_ours_from_info_and_others_from_warning(capsys):
    kept = []
    before = (logging.getLogger().level, list(logging.getLogger().handlers))
    with messages(kept.append, show=True):
        logging.getLogger("camshaft_checkpoint.saving").info("checkpoint step_00000002: 1 MiB in 0.1 s")
        logging.getLogger("camshaft.loop").warning("odd %d", 3)
        logging.getLogger("camshafts").info("somebody else")
        logging.getLogger("urllib3").info("chatter")
        logging.getLogger("urllib3").warning("trouble")
    logging.getLogger("camshaft_checkpoint").info("after")
    wanted = ["checkpoint step_00000002: 1 MiB in 0.1 s", "warning: odd 3", "warning: trouble"]
    assert kept == wanted and capsys.readouterr().err.splitlines() == wanted
    assert (logging.getLogger().level, logging.getLogger().handlers) == before


def test_other_ranks_keep_without_showing(capsys):
    kept = []
    with messages(kept.append, show=False):
        logging.getLogger("camshaft_x").info("kept")
    assert kept == ["kept"] and capsys.readouterr().err == ""
