"""Look at the machines of a run before it is started, under the launcher that will start it, and say what to change.

examples: srun python launchers/doctor.py --config configs/hyenadna-32k.yaml train.run_dir=runs/mine
          torchrun --nproc_per_node 2 launchers/doctor.py
          python launchers/doctor.py --hostfile hostfile
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyena_dist.config.errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    from hyena_dist.tasks.doctor.examine import Report

SSH = 22


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 nothing is wrong, 1 something is, and the table says what to do, 2 a mistake in what "
               "was given (docs/clusters.md).")
    parser.add_argument("--config", metavar="YAML",
                        help="the run's configuration, as of pretrain: its shards and its run directory are looked at")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that replace the file's")
    parser.add_argument("--hostfile", type=Path, metavar="H",
                        help="DeepSpeed's list of hosts: names those that do not come; without a launcher, starts the "
                             "doctor on all of them with the deepspeed command")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S",
                        help="seconds to wait for each thing, first for all ranks (30)")
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not needed otherwise")
    args = parser.parse_intermixed_args(argv)
    if args.overrides and not args.config:
        parser.error("overrides need a --config")
    if not 0 < args.timeout <= 3600:
        parser.error(f"--timeout must be greater than 0 and at most 3600, got {args.timeout}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed)\.")  # their chatter about optional parts
    # A wait that nothing else ends, as in a library, ends here.
    guard = threading.Timer(20 * args.timeout + 60, _give_up, [20 * args.timeout + 60])
    guard.daemon = True
    guard.start()
    try:
        return _run(args, list(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        guard.cancel()


def _give_up(seconds: float) -> None:
    os.write(2, f"error: the doctor did not end in {seconds:.0f} s on {socket.gethostname()}: a library does not "
                "answer; look at the network, the file servers and the GPUs of this host\n".encode())
    os._exit(1)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    from hyena_dist.config.load import load_config
    from hyena_dist.config.presets import find
    from hyena_dist.runtime.launcher import expected_hosts, rank_environment, take_off_quotes

    slots = {} if args.hostfile is None else read_hostfile(args.hostfile)
    take_off_quotes()
    environment = rank_environment(os.environ)
    if slots and environment["WORLD_SIZE"] == "1" and "RANK" not in os.environ:
        return _start_on(slots, args, words)
    hosts = dict(enumerate(host for host, count in slots.items() for _ in range(count))) or expected_hosts()
    config = load_config(find(args.config), args.overrides) if args.config else None
    from hyena_dist.tasks.doctor.examine import examine

    report = examine(environment, config, seconds=args.timeout, hosts=hosts)
    if environment["RANK"] != "0":
        return 0
    if args.json:
        print(json.dumps({"ok": not report.findings, **asdict(report)}, indent=1))
    else:
        _print(report)
    return 1 if report.findings else 0


def read_hostfile(path: Path) -> dict[str, int]:
    """The hosts of a hostfile with their slots.

    Raises:
        ConfigError: it cannot be read, or a line is not `HOST slots=N`; names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({error}): give DeepSpeed's list of hosts") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else ""
        if not count.isdecimal() or not int(count) or words[0] in found:
            raise ConfigError(f"--hostfile {path}: line {number}, {line!r}, must be HOST slots=N, each host once")
        found[words[0]] = int(count)
    if not found:
        raise ConfigError(f"--hostfile {path}: has no host: write a line HOST slots=N for each")
    return found


def _start_on(slots: dict[str, int], args: argparse.Namespace, words: list[str]) -> int:
    """Start the doctor on all hosts, if they can be reached. Status as that of the command."""
    wrong = 0
    for host in slots if len(slots) > 1 else ():
        try:
            socket.create_connection((host, SSH), timeout=args.timeout).close()
        except OSError as error:
            wrong = 1
            print(f"error: {host} does not answer to ssh ({error}): correct its name in {args.hostfile}, or start sshd "
                  "there; under srun or torchrun no ssh is needed", file=sys.stderr)
    launcher = shutil.which("deepspeed")
    if launcher is None:
        raise ConfigError("--hostfile: there is no deepspeed command here: activate the environment that has it")
    if wrong:
        return wrong
    # deepspeed starts a single host without ssh, yet asks it by ssh whether it is there and for its address.
    alone = ["--no_ssh_check", "--master_addr", next(iter(slots))] if len(slots) == 1 else []
    command = [launcher, "--hostfile", str(args.hostfile), *alone, "--module", "hyena_dist.cli.main", "doctor", *words]
    try:
        return subprocess.run(command, check=False, timeout=15 * args.timeout + 60).returncode
    except subprocess.TimeoutExpired:
        print("error: the deepspeed command did not end: look at ssh between the hosts", file=sys.stderr)
        return 1


def _print(report: "Report") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hyena_dist.tasks.doctor.diagnosis import names

    console = Console()
    console.width = max(console.width, 120)  # a file has no width
    hosts = len({fact["host"] for fact in report.facts.values()})
    table = Table("what", "where", "what to do", title_justify="left", show_lines=True,
                  title=f"{len(report.facts)} of {report.ranks} ranks, on {hosts} host{'s' * (hosts != 1)}")
    alike: dict[str, list[int]] = {}
    for rank, fact in sorted(report.facts.items()):
        alike.setdefault(_seen(fact), []).append(rank)
    for seen, ranks in alike.items():
        table.add_row(escape(seen), escape(names(ranks, report.facts)), "")
    for row in report.bandwidth:
        table.add_row(f"{row['what']}: {row['gigabytes_per_second']:.2f} GB/s", escape(row["where"]), "")
    for finding in report.findings:
        table.add_row(f"[bold]WRONG[/] {escape(finding.what)}", escape(finding.where), escape(finding.remedy))
    console.print(table)
    count = len(report.findings)
    console.print(f"{count} thing{'s are' if count > 1 else ' is'} wrong" if count else "nothing is wrong")


def _seen(fact: Mapping[str, Any]) -> str:
    """What a rank sees, in a line."""
    free = fact["shared_memory"]
    gpus = len(fact["gpus"])
    return "; ".join([f"{gpus} GPU{'s' * (gpus != 1)}",
                      ", ".join(f"{name} {version}" for name, version in fact["versions"].items()),
                      "interfaces " + ", ".join(fact["interfaces"]),
                      "/dev/shm " + (f"{free / 2**30:.1f} GiB free" if isinstance(free, int) else "not seen"),
                      f"may open {fact['descriptors']} files" if fact["descriptors"] >= 0 else "may open any files"])
