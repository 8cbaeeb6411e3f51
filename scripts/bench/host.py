"""The other end of `processes.Host`: python -m scripts.bench.host, told what to do line by line."""

import json
import os
import sys

from scripts.bench.settings import Settings


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print shall not come between
    order = json.loads(sys.stdin.readline())
    if order["keep_freed"]:
        from beit.memory import keep_freed_memory  # before torch has threads

        keep_freed_memory()
    import torch

    from scripts.bench import processes, rows
    from scripts.bench.timing import seconds_alone

    settings = Settings(**order["settings"])
    torch.set_num_threads(settings.threads)
    begin = processes.memory()["now"]
    steps = rows.load(order["row"]).build(settings, order["names"])
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        gave: dict[str, float] = {}
        step = steps[json.loads(line)["run"]]
        seconds = seconds_alone(lambda step=step, gave=gave: gave.update(step() or {}))
        told = {"seconds": seconds, "begin": begin, "peak": processes.memory()["peak"], **gave}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
