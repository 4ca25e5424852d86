"""A cluster of one machine for SLURM's commands that stand beside this file: they start real local processes with the
variables of the real ones. A node is called by an address of this machine, 127.0.0.N, so that it can be reached.

The directory $FAKE_SLURM holds a file for each job; with $FAKE_SLURM_HOLD a requeued job stays in the queue. Times are
the real ones: --time=0:20 are twenty seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATE = Path(os.environ["FAKE_SLURM"])
KILL_WAIT = 30.0
"""Seconds between SIGTERM and SIGKILL."""
SHORT = {"-n": "ntasks", "-N": "nodes", "-J": "job-name", "-t": "time", "-o": "output", "-a": "array", "-j": "job",
         "-h": "noheader", "-s": "signal"}
FLAGS = {"requeue", "noheader", "exclusive", "full", "batch"}


def options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options before the first word that is none, and the rest."""
    found, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = SHORT.get(word, name)
        found[name] = value if equals else "yes" if name in FLAGS else rest.pop(0)
    return found, rest


def seconds(text: str) -> float:
    """Of SLURM's MM, MM:SS, HH:MM:SS and D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if len(parts) == 1:
        parts = [*parts, 0]
    return sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600), strict=False)) + 86400 * int(days or 0)


def hosts(nodelist: str) -> list[str]:
    """127.0.0.[1-2] as its hosts."""
    match = re.fullmatch(r"([^\[]*)\[(\d+)-(\d+)\]", nodelist)
    if match is None:
        return [nodelist]
    return [f"{match[1]}{number}" for number in range(int(match[2]), int(match[3]) + 1)]


def count(path: Path, first: int = 0) -> int:
    """The next number of a counter."""
    number = int(path.read_text()) if path.exists() else first
    path.write_text(str(number + 1))
    return number


def read(job: str) -> dict[str, Any]:
    return json.loads((STATE / f"{job}.json").read_text())


def write(job: dict[str, Any]) -> None:
    aside = STATE / f"{job['id']}.tmp"
    aside.write_text(json.dumps(job))
    aside.rename(STATE / f"{job['id']}.json")


def find(name: str) -> dict[str, Any]:
    """A job by its number, or a task of an array by ARRAY_TASK."""
    for path in STATE.glob("*.json"):
        job = json.loads(path.read_text())
        if name in (job["id"], job["name"]):
            return job
    sys.exit(f"scontrol: error: Invalid job id specified {name}")


def job_variables(asked: dict[str, str], job: str) -> dict[str, str]:
    """What a batch script sees, and a shell of salloc."""
    nodes = asked.get("nodes", "1")
    per_node = asked.get("ntasks-per-node")
    nodelist = "127.0.0.1" if nodes == "1" else f"127.0.0.[1-{nodes}]"
    found = {"SLURM_JOB_ID": job, "SLURM_JOBID": job, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes,
             "SLURM_JOB_NODELIST": nodelist, "SLURM_NODELIST": nodelist, "SLURM_SUBMIT_DIR": os.getcwd(),
             "SLURM_JOB_NAME": asked.get("job-name", "job"), "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
             "SLURM_NODEID": "0", "SLURMD_NODENAME": "127.0.0.1"}
    if per_node:
        found |= {"SLURM_NTASKS_PER_NODE": per_node, "SLURM_NTASKS": str(int(nodes) * int(per_node))}
    if "ntasks" in asked:
        found["SLURM_NTASKS"] = asked["ntasks"]
    if "cpus-per-task" in asked:
        found["SLURM_CPUS_PER_TASK"] = asked["cpus-per-task"]
    if "gpus-per-node" in asked:
        found["SLURM_GPUS_ON_NODE"] = asked["gpus-per-node"]
    return found


def submit(words: list[str]) -> None:
    """sbatch: make a job of each task, and leave it to a process of its own."""
    given, (script, *arguments) = options(words)
    text = Path(script).read_text()
    asked: dict[str, str] = {}
    for line in re.findall(r"^#SBATCH (.*)$", text, re.M):
        asked |= options(line.split())[0]
    asked |= given
    span = re.match(r"(\d+)(?:-(\d+))?", asked.get("array", ""))
    tasks = range(int(span[1]), int(span[2] or span[1]) + 1) if span else [None]
    array = None
    for task in tasks:
        number = str(count(STATE / "next_job", 10000 + os.getpid() % 9000))
        array = array or number
        variables = job_variables(asked, number)
        if task is not None:
            variables |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": str(task)}
        copy = STATE / f"{number}.sh"  # SLURM runs a copy from a directory of its own
        copy.write_text(text)
        write({"id": number, "name": number if task is None else f"{array}_{task}", "asked": asked, "restarts": 0,
               "variables": variables, "arguments": arguments, "state": "PENDING", "exit": None, "batch": None})
        subprocess.Popen([sys.executable, __file__, "supervise", number], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {array}")


def supervise(number: str) -> None:
    """What slurmctld and slurmd do with a job: start it, signal it before its time is up, start it again."""
    while True:
        job, requeue = read(number), STATE / f"{number}.requeue"
        log = STATE / f"{number}.log"  # of whatever name was asked for: the submit directory is the project's own
        variables = dict(job["variables"])
        if job["restarts"]:
            variables["SLURM_RESTART_COUNT"] = str(job["restarts"])
        limit = seconds(job["asked"]["time"]) if "time" in job["asked"] else None
        end = None if limit is None else time.time() + limit
        with log.open("a") as file:
            batch = subprocess.Popen(["bash", str(STATE / f"{number}.sh"), *job["arguments"]], cwd=STATE,
                                     env=os.environ | variables, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                     start_new_session=True)
        write(job | {"state": "RUNNING", "batch": batch.pid, "end": end})
        watch(batch, job, end, requeue)
        job = read(number)
        if requeue.exists():
            requeue.unlink()
            write(job | {"state": "PENDING", "restarts": job["restarts"] + 1, "exit": batch.returncode})
            if "FAKE_SLURM_HOLD" in os.environ:
                return
        else:
            write(job | {"state": "COMPLETED" if batch.returncode == 0 else "FAILED", "exit": batch.returncode})
            return


def watch(batch: subprocess.Popen, job: dict[str, Any], end: float | None, requeue: Path) -> None:
    """Until the batch script has ended, by itself or by SLURM."""
    name, _, before = job["asked"].get("signal", "").rpartition("@")
    to_shell, name = name.startswith("B:"), name.removeprefix("B:")
    terminated: float | None = None
    while batch.poll() is None:
        time.sleep(0.05)
        if name and end is not None and time.time() >= end - float(before):
            send(job["id"], name, batch=to_shell)
            name = ""
        over = (end is not None and time.time() >= end
                or requeue.exists() and time.time() >= requeue.stat().st_mtime + 2)
        if over and terminated is None:
            terminated = time.time()
            send(job["id"], "TERM")
            send(job["id"], "TERM", batch=True)
        if terminated is not None and time.time() >= terminated + KILL_WAIT:
            send(job["id"], "KILL")
            os.killpg(batch.pid, signal.SIGKILL)


def tasks_of(job: str) -> list[int]:
    """The processes of all tasks of all steps that were started, by rank."""
    return [int(pid) for path in sorted(STATE.glob(f"{job}.step.*")) for pid in path.read_text().split()]


def send(job: str, name: str, *, batch: bool = False) -> None:
    """A signal to the batch shell, or to all tasks of all steps."""
    for pid in [read(job)["batch"]] if batch else tasks_of(job):
        try:
            os.kill(pid, getattr(signal, f"SIG{name.removeprefix('SIG')}"))
        except ProcessLookupError:
            pass


def srun(words: list[str]) -> int:
    """Start a step: as many tasks as asked for, each a process group of its own. Its own signals go to all of them."""
    asked, command = options(words)
    environment = dict(os.environ)
    job, nodes = environment["SLURM_JOB_ID"], int(asked.get("nodes", environment["SLURM_JOB_NUM_NODES"]))
    per_node = int(asked.get("ntasks-per-node", environment.get("SLURM_NTASKS_PER_NODE", 1)))
    ntasks = int(asked.get("ntasks", nodes * per_node))
    step = str(count(STATE / f"{job}.next_step"))
    for word in asked.get("export", "ALL").split(",")[1:]:
        key, _, value = word.partition("=")
        environment[key] = value  # as it stands: no shell takes quotes off
    if environment.get("SLURM_CPUS_PER_TASK") and "cpus-per-task" not in asked:
        del environment["SLURM_CPUS_PER_TASK"]
    tasks = []
    for rank in range(ntasks):
        node = rank // per_node
        variables = {"SLURM_STEP_ID": step, "SLURM_STEPID": step, "SLURM_PROCID": str(rank),
                     "SLURM_NTASKS": str(ntasks), "SLURM_NPROCS": str(ntasks),
                     "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(node),
                     "SLURM_STEP_NUM_TASKS": str(ntasks), "SLURM_STEP_NUM_NODES": str(nodes),
                     "SLURM_STEP_NODELIST": environment["SLURM_JOB_NODELIST"],
                     "SLURMD_NODENAME": hosts(environment["SLURM_JOB_NODELIST"])[node]}
        tasks.append(subprocess.Popen(command, env=environment | variables, start_new_session=True))
    (STATE / f"{job}.step.{step}").write_text(" ".join(str(task.pid) for task in tasks))

    def pass_on(number: int, _frame: object) -> None:
        kill(tasks, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, pass_on)
    failed: float | None = None
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
        if asked.get("kill-on-bad-exit") == "1" and failed is None and any(task.returncode for task in tasks):
            failed = time.monotonic()
            kill(tasks, signal.SIGTERM)
        if failed is not None and time.monotonic() - failed > KILL_WAIT:
            kill(tasks, signal.SIGKILL)
    (STATE / f"{job}.step.{step}").unlink()
    return max(128 - code if code < 0 else code for code in (task.returncode for task in tasks))


def kill(tasks: list[subprocess.Popen], number: int) -> None:
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)


def salloc(words: list[str]) -> int:
    """A command in a job, as in the interactive shell that sites have salloc start: a step of one task."""
    asked, command = options(words)
    number = str(count(STATE / "next_job", 10000 + os.getpid() % 9000))
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_STEPID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    return subprocess.run(command, env=os.environ | job_variables(asked, number) | shell, check=False).returncode


def scontrol(words: list[str]) -> None:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(hosts(words[2])))
    elif words[0] == "requeue":
        job = find(words[1])
        with (STATE / "requeued").open("a") as file:
            file.write(f"{words[1]}\n")
        (STATE / f"{job['id']}.requeue").touch()
    else:
        sys.exit(f"scontrol: error: this one knows nothing of {words}")


def squeue(words: list[str]) -> None:
    asked, _ = options(words)
    for path in sorted(STATE.glob("*.json")):
        job = json.loads(path.read_text())
        if asked.get("job") not in (None, job["id"], job["name"]) or job["state"] not in ("PENDING", "RUNNING"):
            continue
        end = "N/A" if not job.get("end") else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job["end"]))
        line = asked.get("format", "%i %T %e")
        for sign, value in (("%i", job["name"]), ("%T", job["state"]), ("%e", end), ("%r", "None")):
            line = line.replace(sign, str(value))
        print(line)


def scancel(words: list[str]) -> None:
    """scancel --signal=NAME [--batch] JOB."""
    asked, names = options(words)
    for name in names:
        send(find(name)["id"], asked.get("signal", "TERM"), batch="batch" in asked)


def main() -> int:
    name, words = Path(sys.argv[0]).name, sys.argv[1:]
    if name == "cluster.py":
        supervise(words[1])
        return 0
    commands = {"sbatch": submit, "srun": srun, "salloc": salloc, "scontrol": scontrol, "squeue": squeue,
                "scancel": scancel, "sinfo": lambda words: None}
    return commands[name](words) or 0


if __name__ == "__main__":
    sys.exit(main())
