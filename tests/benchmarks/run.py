"""Measures lfsvc against peers in the same run, in the booted test machine, and prints ratios.

usage: python3 tests/benchmarks/run.py     (as root; ./tests/run.sh once before, for the wheels)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "integration"))

from machine import HOME, Machine

# Runs inside the machine, as the user, so that entering the machine is not measured.
INSIDE = r"""
import json, os, statistics, subprocess, sys, time

python, home = sys.executable, os.environ["HOME"]
work = home + "/work"


def median(argv, count=15):
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def lfsvc(*arguments):
    return ["lfsvc", *arguments]


def drain():
    subprocess.run(lfsvc("wait", "--all"), check=False)


def first_instruction(argv):
    # The job writes the clock as soon as it runs; the shell that does it is the same for both.
    times = []
    for _ in range(11):
        try:
            os.unlink(work + "/stamp")
        except FileNotFoundError:
            pass
        begin = time.time()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        accepted = time.time()
        while not (os.path.exists(work + "/stamp") and os.path.getsize(work + "/stamp") > 10):
            time.sleep(0.001)
        with open(work + "/stamp") as file:
            times.append(float(file.read()) - begin)
        drain()
        time.sleep(0.1)
    return statistics.median(times)


def script(name, text):
    path = f"{work}/{name}.sh"
    with open(path, "w") as file:
        file.write(text)
    return path


def chatty(path):
    subprocess.run(lfsvc("submit", path), check=True, stdout=subprocess.DEVNULL)
    drain()
    with open(work + "/took") as file:
        return float(file.read())


os.makedirs(work, exist_ok=True)
empty = script("empty", "")
stamp = script("stamp", f"date +%s.%N >{work}/stamp\n")
subprocess.run(lfsvc("status"), check=True, stdout=subprocess.DEVNULL)
rows = []
bare = median([python, "-c", "pass"])
long = script("hold", f"while [ ! -e {work}/go ]; do sleep 0.1; done\n")
# With a job running: what is measured is the acceptance, not the start of the job beside it.
subprocess.run(lfsvc("submit", long), check=True, stdout=subprocess.DEVNULL)
for name, argv in (("--help", lfsvc("--help")), ("status", lfsvc("status")), ("submit x.sh", lfsvc("submit", empty))):
    rows.append((f"`lfsvc {name}`", median(argv) / bare, "`python -c pass`", "at most 4"))
open(work + "/go", "w").close()
drain()
os.unlink(work + "/go")

call = ["busctl", "--user", "call", "org.lfsvc1", "/org/lfsvc1", "org.lfsvc1.Scheduler", "Submit", "s", stamp]
run = ["systemd-run", "--user", "--collect", "-q", "bash", stamp]
peer = first_instruction(run)
rows.append(("submission to first instruction (busctl)", first_instruction(call) / peer,
             "`systemd-run --user --collect`", "at most 4"))

begin = time.perf_counter()
for _ in range(50):
    subprocess.run(["systemd-run", "--user", "--wait", "--collect", "-q", "bash", empty], check=True)
peer_rate = 50 / (time.perf_counter() - begin)
subprocess.run(lfsvc("submit", long), check=True, stdout=subprocess.DEVNULL)
subprocess.run(lfsvc("submit", *[empty] * 200), check=True, stdout=subprocess.DEVNULL)
open(work + "/go", "w").close()
begin = time.perf_counter()
drain()
rows.append(("rate of 200 empty scripts", 200 / (time.perf_counter() - begin) / peer_rate,
             "`systemd-run --user --wait`", "at least 0.3"))

loop = "import os,time\nb=time.perf_counter()\nfor i in range(200000): os.write(1, b'line %d of the output\\n' % i)\n"
with open(work + "/talk.py", "w") as file:
    file.write(loop + f"open('{work}/took','w').write(str(time.perf_counter()-b))\n")
pipe, direct = [], []
for _ in range(3):
    subprocess.run([python, work + "/talk.py"], stdout=open(work + "/direct.log", "w"), check=True)
    direct.append(float(open(work + "/took").read()))
    pipe.append(chatty(script("talk", f"exec {python} {work}/talk.py\n")))
rows.append(("a job of 200,000 lines", statistics.median(pipe) / statistics.median(direct),
             "the same into a file", "at most 1"))

kills = []
tree = script("tree", f"for i in $(seq 32); do setsid sleep 98765 & done; touch {work}/up; wait\n")
for _ in range(5):
    subprocess.run(["rm", "-f", work + "/up"])
    subprocess.run(lfsvc("submit", tree), check=True, stdout=subprocess.DEVNULL)
    while not os.path.exists(work + "/up"):
        time.sleep(0.01)
    time.sleep(0.2)
    begin = time.perf_counter()
    subprocess.run(["busctl", "--user", "call", *call[3:6], "Kill"], check=True, stdout=subprocess.DEVNULL)
    while subprocess.run(["pgrep", "-fx", "sleep 98765"], stdout=subprocess.DEVNULL).returncode == 0:
        pass
    kills.append(time.perf_counter() - begin)
    drain()
print_ms = statistics.median(kills) * 1000

pid = int(open(home + "/.local/state/lfsvc/lock").read())


def rss(number):
    return int(next(l for l in open(f"/proc/{number}/status") if l.startswith("VmRSS")).split()[1])


idle = subprocess.Popen([python, "-c", "import dbus_next.aio, sqlite3, yaml; input()"], stdin=subprocess.PIPE)
time.sleep(1)
subprocess.run(["systemctl", "--user", "restart", "lfsched"], check=True)
time.sleep(1)
pid = int(open(home + "/.local/state/lfsvc/lock").read())
rows.append(("resident memory when idle", rss(pid) / rss(idle.pid),
             "dbus-next, sqlite3 and yaml imported", "at most 1.3"))
idle.kill()


def switches():
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        for line in open(f"/proc/{pid}/task/{task}/status"):
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


before = switches()
time.sleep(20)
woken = switches() - before
print("| what | ratio | to | aim |\n|---|---|---|---|")
for name, ratio, peer, aim in rows:
    print(f"| {name} | {ratio:.2f} | {peer} | {aim} |")
print(f"\nKill of 32 setsid'd children that obey SIGTERM: {print_ms:.0f} ms from the call to the last one's end.")
print(f"Idle for 20 s: {woken} context switches (the watchdog pings every 30 s).")
print(f"`python -c pass` here: {bare * 1000:.1f} ms.")
"""


def main() -> int:
    """Boot, measure, print."""
    cache = Path(os.environ.get("LFSVC_CACHE", "/var/cache/lfsvc"))
    # A folder for each checkout; the one that ./tests/run.sh has just made is this one's.
    wheels = max(cache.glob("wheels-*"), key=lambda folder: folder.stat().st_mtime)
    with Machine.booted() as machine:
        machine.install(wheels)
        machine.run(["lfsvc", "setup", "--no-linger"])
        machine.write(f"{HOME}/bench.py", INSIDE)
        done = machine.run([machine.python, f"{HOME}/bench.py"], timeout=500, check=False)
        print(done.stdout)
        print(done.stderr, file=sys.stderr)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
