#!/usr/bin/env python3
"""Times `lapidary convert` beside a plain copy of the same bytes, in alternation, with a warm page cache.

    python3 scripts/measure_convert.py target/release/lapidary SOURCE hf|maxtext WORK [--pairs 3]

SOURCE is a checkpoint in the other format, WORK a directory that does not exist; it is removed after every run. A line of
JSON for every pair: wall time and processor seconds of both, what other processes used meanwhile (a pair counts only if
that is little), and the peak of anonymous and of mapped memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import threading
import time


def read_all(directory):
    for root, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(root, name), "rb") as f:
                while f.read(1 << 24):
                    pass


def busy():
    """Processor seconds that all processes have used since the machine started."""
    with open("/proc/stat") as f:
        values = [int(v) for v in f.readline().split()[1:]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def run(command):
    """Runs a command; gives its times and peaks."""
    peak = {"RssAnon": 0, "RssFile": 0}
    ended = threading.Event()
    before, start = busy(), time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def watch():
        while not ended.wait(0.01):
            try:
                with open(f"/proc/{process.pid}/status") as f:
                    for line in f:
                        key = line.split(":")[0]
                        if key in peak:
                            peak[key] = max(peak[key], int(line.split()[1]) // 1024)
            except OSError:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall, all_busy = time.time() - start, busy() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "wall": round(wall, 2),
        "cpu": round(cpu, 2),
        "others_cpu": round(all_busy - cpu, 2),
        "anonymous_mib": peak["RssAnon"],
        "mapped_mib": peak["RssFile"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary")
    parser.add_argument("source")
    parser.add_argument("format", choices=["hf", "maxtext"])
    parser.add_argument("work")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    if os.path.exists(args.work):
        raise SystemExit(f"{args.work} exists")

    def fresh(command):
        shutil.rmtree(args.work, ignore_errors=True)
        subprocess.run(["sync"], check=True)
        read_all(args.source)
        return run(command)

    try:
        for _ in range(args.pairs):
            copy = fresh(["cp", "-r", args.source, args.work])
            convert = fresh([args.binary, "convert", args.source, args.work, "--to", args.format])
            ratio = round(convert["wall"] / copy["wall"], 2)
            print(json.dumps({"cp": copy, "convert": convert, "ratio": ratio}), flush=True)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    main()
