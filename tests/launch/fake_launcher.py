"""A launcher as deepspeed's is, without its 4 s of imports: spawns ranks, ends all when one fails.

Called with ``deepspeed.launcher.launch`` as its first argument, so that ranks take it for one.
"""

import os
import signal
import subprocess
import sys
import time


def main() -> int:
    _, _, count, *target = sys.argv
    ranks = []
    for rank in range(int(count)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_SIZE": count, "CROSS_SIZE": 1}
        environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
        ranks.append(subprocess.Popen([sys.executable, "-u", *target], env=environ))
    while ranks:
        for process in list(ranks):
            status = process.poll()
            if status == 0:
                ranks.remove(process)
            elif status is not None:
                for other in ranks:
                    other.send_signal(signal.SIGTERM)
                for other in ranks:
                    other.wait()
                return status % 256
        time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
