"""The command line: which commands there are, how they are read, and how errors are printed."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable

from lfsvc.errors import LfsvcError, WrongUse

Handler = Callable[[argparse.Namespace], int]

INTERRUPTED = 130
# 128 + SIGPIPE
BROKEN_PIPE = 141

GRAMMAR = """\
TASK is [train:|eval:]PATH.yaml[@D[,D...]][#no_eval], or PATH.sh:
  train:run.yaml@0,1  train on devices 0 and 1, merge, evaluate (#no_eval: do not)
  eval:bench.yaml@0   evaluate
  prepare.sh          run a shell script
"""


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASK", nargs="+", help="what to run, in this order")
    waiting = parser.add_mutually_exclusive_group()
    waiting.add_argument(
        "--wait",
        action="store_true",
        help="wait for the end (not for an evaluation that it queues); exit with its status",
    )
    waiting.add_argument("--follow", action="store_true", help="as --wait, and print the job's output as it comes")
    _env_argument(parser)
    parser.add_argument("--name", default="", help="shown in place of the file's name")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--requeue", action="store_true", help="queue it again, once, if the machine goes down under it")
    again.add_argument("--no-requeue", action="store_true", help="never do (a .sh without --requeue is not, either)")
    parser.add_argument("--force", action="store_true", help="submit although LLaMA-Factory would refuse it")
    _json_argument(parser)


def _env_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env", metavar="KEY[=VALUE]", action="append", default=[],
        help="environment of the job alone; without a value, this shell's",
    )  # fmt: skip


def _json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help="as for submit")
    _env_argument(parser)
    parser.add_argument("--force", action="store_true", help="as for submit --force")
    _json_argument(parser)


def _kill_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", nargs="?", type=job_id, help="default: the job that runs")
    _json_argument(parser)


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--lines", type=positive, metavar="N", help="how many (default 100; all with --since)")
    parser.add_argument("--state", action="append", default=[], metavar="STATE", help="only these; may be repeated")
    parser.add_argument("--since", metavar="TIME", help="ended since, or not yet: 2h, 3d, today, 2026-03-01, ...")
    _json_argument(parser)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", type=job_id, help="the number of a job: lfsvc list shows them")
    _json_argument(parser)


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", nargs="?", type=job_id, help="default: the job that runs, else the last")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    parser.add_argument("-n", "--lines", type=positive, metavar="N", help="only the last N lines")
    parser.add_argument("--step", metavar="STEP", help="only this one: train, merge, eval, collect or shell")
    parser.add_argument("--journal", action="store_true", help="from the journal instead of the log files")


def _wait_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="*", type=job_id, help="default: the job that runs, else the last")
    parser.add_argument("--all", action="store_true", help="until nothing waits or runs any more, evaluations included")
    _json_argument(parser)


def _results_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", metavar="ID", nargs="*", help="with --plot: jobs, or output folders of trainings")
    parser.add_argument("--sort", metavar="METRIC", help="best first")
    parser.add_argument("--all", action="store_true", help="every column, whatever the width")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print summary.csv as it is")
    form.add_argument("--plot", choices=("loss",), help="draw the training loss of these jobs into a picture")
    parser.add_argument("-o", "--output", metavar="FILE", help="the picture, .png or .svg (default loss.png)")


def _notify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("test",), help="send a test message to every target of `notify:`")
    parser.add_argument("--target", type=positive, metavar="N", help="only to the Nth entry")


def _setup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remove", action="store_true", help="take the service away again; queue and results stay")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written and started; change nothing")
    parser.add_argument("--no-linger", action="store_true", help="do not enable linger: jobs end when you log out")
    parser.add_argument("--no-start", action="store_true", help="write the files, start nothing")


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detach", action="store_true", help="in the background; returns when it is ready")
    parser.add_argument("--launcher", choices=("auto", "systemd", "process"), help="overrides the config")


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


# Command → (module of its handler, its arguments, one line of help, examples). The handler is named as the command.
# The examples are run by a test.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str, tuple[str, ...]]] = {
    "submit": (
        "submit", _submit_arguments, "queue trainings, evaluations and scripts",
        ("lfsvc submit train:run.yaml@0,1", "lfsvc submit run.yaml#no_eval prepare.sh --name night"),
    ),
    "check": ("submit", _check_arguments, "say what submit would say, and queue nothing", ("lfsvc check run.yaml@0",)),
    "kill": ("control", _kill_arguments, "end a running job, cancel a waiting one", ("lfsvc kill", "lfsvc kill 3")),
    "wait": ("follow", _wait_arguments, "wait for the end of jobs", ("lfsvc wait --all", "lfsvc wait 1 2")),
    "status": ("show", _json_argument, "what runs, what waits, what ended", ("lfsvc status", "lfsvc status --json")),
    "watch": ("watch", _no_arguments, "status, live, until you press q", ("lfsvc watch",)),
    "list": (
        "show", _list_arguments, "the jobs so far, newest first",
        ("lfsvc list -n 20 --state failed", "lfsvc list --since yesterday"),
    ),
    "show": ("show", _show_arguments, "everything about one job", ("lfsvc show 1",)),
    "logs": ("follow", _logs_arguments, "the output of a job", ("lfsvc logs -f", "lfsvc logs 1 --step train")),
    "results": (
        "results", _results_arguments, "the evaluations so far; loss curves",
        ("lfsvc results --sort eval_loss", "lfsvc results --plot loss 1 -o loss.svg"),
    ),
    "notify": (
        "notify", _notify_arguments, "try the notifications that config.yaml sets",
        ("lfsvc notify test", "lfsvc notify test --target 2"),
    ),
    "setup": (
        "setup", _setup_arguments, "install the scheduler as a service of yours",
        ("lfsvc setup", "lfsvc setup --dry-run"),
    ),
    "doctor": (
        "doctor", _json_argument, "what keeps jobs from running here, and the fix", ("lfsvc doctor",)
    ),
    "start": ("control", _no_arguments, "start the scheduler", ("lfsvc start",)),
    "stop": ("control", _no_arguments, "stop the scheduler; jobs go on", ("lfsvc stop",)),
    "completion": (
        "completion", _completion_arguments, "print the completions of a shell: bash or zsh", ("lfsvc completion bash",)
    ),
    "serve": ("", _serve_arguments, "run the scheduler here, without systemd say", ("lfsvc serve --detach",)),
}  # fmt: skip

# The overview: what people want → the commands for it.
GROUPS: dict[str, tuple[str, ...]] = {
    "Run": ("submit", "check", "kill", "wait"),
    "Look": ("status", "watch", "list", "show", "logs", "results"),
    "Service": ("setup", "doctor", "start", "stop", "serve", "notify", "completion"),
}


def job_id(text: str) -> int:
    """Read a job's number."""
    if text.isascii() and text.isdigit() and 0 < int(text[:20]) < 2**63:
        return int(text)
    digits = "".join(character for character in text if character.isascii() and character.isdigit())[:18]
    meant = f"did you mean {int(digits)}?" if digits.strip("0") else "lfsvc list shows them"
    raise argparse.ArgumentTypeError(f"{text!r} is not the number of a job ({meant})")


def positive(text: str) -> int:
    """Read a number above 0."""
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text[:9])


class _Parser(argparse.ArgumentParser):
    """Wrong use is an exception with a sentence, so that it is printed as all others are."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse calls it NoReturn, and so it is
        raise WrongUse(message[:1].upper() + message[1:] + ".", f"{self.prog} --help")


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """Make the parser: of one command, which is quick, or of all."""
    parser = _Parser(prog="lfsvc", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="print this overview")
    parser.add_argument("--version", action="store_true", help="print the version")
    # prog is given, or argparse formats a usage line to find it: 2 ms.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="lfsvc")
    for name in [command] if command in COMMANDS else COMMANDS:
        _, add_arguments, help_text, examples = COMMANDS[name]
        shown = "examples:\n" + "".join(f"  {example}\n" for example in examples)
        sub = commands.add_parser(
            name,
            help=help_text,
            description=help_text[:1].upper() + help_text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"{GRAMMAR}\n{shown}" if name in ("submit", "check") else shown,
        )
        add_arguments(sub)
    return parser


def overview() -> str:
    """What `lfsvc --help` prints: 80 columns and 24 lines at most, by what people want."""
    lines = ["lfsvc: a queue for LLaMA-Factory. One job at a time, through the night.", ""]
    for title, names in GROUPS.items():
        for name in names:
            if name in COMMANDS:
                lines.append(f"{title:<8} {name:<11} {COMMANDS[name][2]}")
                title = ""
    lines += [
        "",
        "A TASK is [train:|eval:]PATH.yaml[@DEVICE,...][#no_eval], or PATH.sh.",
        "lfsvc COMMAND --help tells more, with examples. lfsvc --version, --help.",
    ]
    return "\n".join(lines)


def handler_of(command: str) -> Handler:
    """Import the module of a command and give its handler."""
    from importlib import import_module

    module = import_module(f"lfsvc.client.{COMMANDS[command][0]}")
    handler: Handler = getattr(module, f"{command}_command")
    return handler


def run(arguments: list[str]) -> int:
    """Run a command line; give the exit status. Errors go to stderr as one sentence and a hint."""
    for stream in (sys.stdout, sys.stderr):
        # A job that is queued must not look like a fault because its name cannot be shown.
        if (stream.encoding or "").lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper, as at every start
    try:
        return _run(arguments)
    except LfsvcError as error:
        _print_trace()
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `lfsvc logs | head`: whoever read has enough.
        _give_up_stdout()
        # Where the status is that of a job, its end has not been seen.
        waiting = arguments[:1] == ["wait"] or not {"--wait", "--follow"}.isdisjoint(arguments)
        return BROKEN_PIPE if waiting else 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            return _fault(error)
        _give_up_stdout()
        print_error(LfsvcError(f"The output cannot be written: {error.strerror}.", "look where stdout goes"))
        return LfsvcError.exit_status
    except Exception as error:
        return _fault(error)


def _give_up_stdout() -> None:
    """Let what is still to be flushed go nowhere, or Python complains at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fault(error: Exception) -> int:
    """Say that lfsvc is at fault. Nobody is helped by a traceback that did not ask for one."""
    if not _print_trace():
        fault = LfsvcError(
            f"A fault in lfsvc: {type(error).__name__}: {error}.",
            "LFSVC_DEBUG=1 before the command shows where; please report that",
        )
        print_error(fault)
    return LfsvcError.exit_status


def _print_trace() -> bool:
    """Print where an error comes from, for whoever wants to know."""
    if os.environ.get("LFSVC_DEBUG", "") in ("", "0"):
        return False
    import traceback

    traceback.print_exc()
    return True


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "help":
        arguments = [*arguments[1:2], "--help"]
        command = arguments[0]
    if command and not command.startswith("-") and command not in COMMANDS:
        raise WrongUse(f"There is no command {command!r}.", _suggestion(command))
    parser = make_parser(command)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        named = f"lfsvc {command}" if command in COMMANDS else "lfsvc"
        raise WrongUse(f"Unrecognized arguments: {' '.join(unknown)}.", f"{named} --help")
    if namespace.version:
        import lfsvc

        print(f"lfsvc {lfsvc.__version__}")
        return 0
    if not namespace.command:
        print(overview())
        return 0
    status = handler_of(namespace.command)(namespace)
    sys.stdout.flush()
    return status


def _suggestion(word: str) -> str:
    from difflib import get_close_matches

    if word.endswith((".yaml", ".sh", "#no_eval")) or word.startswith(("train:", "eval:")):
        return f"did you mean: lfsvc submit {word}"
    close = get_close_matches(word, COMMANDS, n=1)
    return f"did you mean: lfsvc {close[0]}" if close else "lfsvc --help lists the commands"


def print_error(error: LfsvcError) -> None:
    """Print an error as people see it."""
    from lfsvc.client.output import emit, error_lines, terminal_width

    emit(error_lines(error.text, terminal_width(sys.stderr)), sys.stderr)
