"""The manual page lfsvc(1), printed as roff: made from the command line's own parser and the settings' own table.

    python3 packaging/man.py >lfsvc.1

Standard library and lfsvc only. The date is SOURCE_DATE_EPOCH's (seconds), so that a build can be repeated.
Source: man(7), groff_man(7).
"""

import argparse
import dataclasses
import functools
import os
import sys
import textwrap
import time
from collections.abc import Iterable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lfsvc import __version__
from lfsvc.client.cli import COMMANDS, GRAMMAR, make_parser
from lfsvc.config import Config, key_of
from lfsvc.llamafactory.environment import DEFAULTS

DESCRIPTION = """\
lfsvc keeps a queue of trainings, evaluations and shell scripts, and runs them one after another on the GPUs or
NPUs of one machine: through crashes, logouts and restarts. A training is followed by the merge of its LoRA adapter
and by an evaluation of its own. Every job's output is in a file and in the journal; killing a job frees every
device that it held.

The queue belongs to one user and is kept by lfsched.service, a unit of that user's systemd. The first call starts it.
Every job is a unit of its own: a restart, an upgrade or a crash of the scheduler costs a running job nothing.
Without systemd, *lfsvc serve* does the same in a terminal.

*lfsvc setup*, run once where llamafactory-cli is on the PATH, makes it known to the jobs, and starts the scheduler at
every login."""

EXIT_STATUS = (
    ("0", "Done."),
    ("1", "The scheduler refused or failed."),
    ("2", "Wrong use, or an invalid task."),
    ("3", "No scheduler can be reached."),
    ("130", "Interrupted by the user."),
)
EXIT_STATUS_WAIT = """\
With --wait and --follow, and of *lfsvc wait*: 0 only if the job succeeded, else its exit status if that is
1 to 255, else 1."""

FILES = (
    ("~/.config/lfsvc/config.yaml", "Settings, see above. *systemctl --user reload lfsched* reads them again."),
    (
        "~/.config/lfsvc/environment",
        "The environment of the jobs, in the format of systemd's EnvironmentFile=; read at every start of a job. "
        "*lfsvc setup* writes it.",
    ),
    ("~/.local/state/lfsvc/", "The queue, the jobs' folders, the logs of scripts."),
    ("~/.local/share/lfsvc/eval_results/", "Evaluations, and the table of all of them, summary.csv."),
    (
        "~/.config/systemd/user/lfsched.service",
        "The unit that *lfsvc setup* of an installation of your own writes; it wins over the one of a package.",
    ),
    ("/usr/lib/systemd/user/lfsched.service", "The unit of a package."),
)

ENVIRONMENT = (
    ("XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_DATA_HOME", "They move the files above."),
    (
        "DBUS_SESSION_BUS_ADDRESS",
        "The bus where the scheduler is. Where it is not set, the bus of the user's systemd is tried, then the one "
        "that *lfsvc serve* starts.",
    ),
    ("NO_COLOR", "Where it is set, nothing is printed in colour or bold."),
    ("LFSVC_JOB_ID", "Set in every job: its number."),
)

EXAMPLES = (
    ("A training on four devices, its merge and its evaluation:", "lfsvc submit train:run.yaml@0,1,2,3"),
    ("Several at once, in this order:", "lfsvc submit prepare.sh first.yaml@0 second.yaml@0#no_eval"),
    ("See what it does:", "lfsvc logs -f"),
    ("End the running job, cancel a waiting one:", "lfsvc kill\nlfsvc kill 3"),
    ("Why did job 1 fail?", "lfsvc show 1\njournalctl --user -x -u lfsched JOB_ID=1"),
    ("Wait for the last one:", "lfsvc submit --wait last.yaml && shutdown-my-vm"),
    ("From another program:", "busctl --user call org.lfsvc1 /org/lfsvc1 org.lfsvc1.Scheduler Submit s /abs/x.yaml@0"),
)

SEE_ALSO = ("busctl(1)", "journalctl(1)", "loginctl(1)", "systemctl(1)", "systemd.exec(5)")


ESCAPES = str.maketrans(
    {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"},
)


def escape(text: str) -> str:
    """Text as roff prints it letter for letter: hyphens that can be copied, no escapes."""
    return text.translate(ESCAPES)


def bold(text: str) -> str:
    """Text in bold."""
    return f"\\fB{escape(text)}\\fR"


def guarded(lines: Iterable[str]) -> str:
    """Lines of roff of which none is taken for a request."""
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in lines)


def filled(roff: str) -> str:
    """A paragraph of roff in lines of a decent length."""
    return guarded(textwrap.wrap(roff, 79, break_long_words=False, break_on_hyphens=False))


def prose(text: str) -> str:
    """Paragraphs of text in which *what stands between stars* is bold."""
    return "\n.PP\n".join(
        filled("".join(bold(part) if number % 2 else escape(part) for number, part in enumerate(paragraph.split("*"))))
        for paragraph in text.split("\n\n")
    )


def block(text: str) -> str:
    """Lines that stay as they are, indented."""
    return f".RS 4\n.nf\n{guarded(escape(text.rstrip()).splitlines())}\n.fi\n.RE"


def entries(rows: Iterable[tuple[str, str]]) -> str:
    """Terms, each with its explanation; both are roff already."""
    return "\n".join(f".TP\n{term}\n{explanation}" for term, explanation in rows)


def invocation(action: argparse.Action) -> str:
    """How an argument is written: -o, --output FILE."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = f"\\fI{escape(str(action.metavar or choices))}\\fR"
    names = ", ".join(map(bold, action.option_strings))
    if action.option_strings and action.nargs == 0:
        return names
    return f"{names} {value}".strip()


def arguments(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """The arguments of a parser that have something to say."""
    return [
        (invocation(action), filled(escape(action.help)))
        for action in parser._actions
        if action.help and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]


def usage(parser: argparse.ArgumentParser) -> str:
    """How a command is called, on one line."""
    # argparse breaks lines for the terminal.
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=10_000)
    words = " ".join(parser.format_usage().split()).removeprefix("usage: ").replace(" [-h]", "")
    return bold(parser.prog) + escape(words.removeprefix(parser.prog))


def command(name: str) -> str:
    """A command: how it is called, what it does, its arguments."""
    (commands,) = (action for action in make_parser(name)._actions if isinstance(action, argparse._SubParsersAction))
    parser = commands.choices[name]
    text = entries([(usage(parser), filled(escape(parser.description)))])
    listed = arguments(parser)
    return f"{text}\n.RS\n{entries(listed)}\n.RE" if listed else text


def settings() -> str:
    """The keys of config.yaml."""
    rows = []
    for field in dataclasses.fields(Config):
        default, help_text = field.default, field.metadata["help"]
        # A default that is no plain word or number is told by the help itself.
        if isinstance(default, bool):
            help_text += f" (default {str(default).lower()})"
        elif isinstance(default, int | float) or (default and "default" not in help_text):
            help_text += f" (default {default:g})" if isinstance(default, int | float) else f" (default {default})"
        rows.append((bold(key_of(field)), filled(escape(help_text))))
    return prose("Keys of ~/.config/lfsvc/config.yaml; what stands before a dot is a section.") + "\n" + entries(rows)


def environment() -> str:
    """What lfsvc reads, and what the jobs get."""
    defaults = ", ".join(f"{name}={value}" for name, value in DEFAULTS.items())
    jobs = f"Where nothing else sets them, jobs get {defaults}. *lfsvc submit --env* sets a variable of one job."
    return entries((bold(name), prose(text)) for name, text in ENVIRONMENT) + "\n.PP\n" + prose(jobs)


def tasks() -> str:
    """The task grammar, as the help shows it."""
    first, _, examples = GRAMMAR.partition("\n")
    return f"{filled(escape(first))}\n{block(examples)}"


def page() -> str:
    """The whole page."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    sections = {
        "NAME": "lfsvc \\- a job queue for LLaMA\\-Factory",
        "SYNOPSIS": ".B lfsvc\n.I COMMAND\n.RI [ ARGUMENT ]...\n.br\n.B lfsvc\n.RI [ COMMAND ]\n.B \\-\\-help",
        "DESCRIPTION": prose(DESCRIPTION) + "\n" + entries(arguments(make_parser())),
        "COMMANDS": "\n".join(map(command, COMMANDS)),
        "TASKS": tasks(),
        "SETTINGS": settings(),
        "EXIT STATUS": entries((bold(status), prose(text)) for status, text in EXIT_STATUS)
        + "\n.PP\n"
        + prose(EXIT_STATUS_WAIT),
        "ENVIRONMENT": environment(),
        "FILES": entries((bold(path), prose(text)) for path, text in FILES),
        "EXAMPLES": "\n.PP\n".join(f"{filled(escape(text))}\n{block(lines)}" for text, lines in EXAMPLES),
        "SEE ALSO": " ,\n".join(f".BR {escape(name[:-3])} {name[-3:]}" for name in SEE_ALSO),
    }
    title = f'.TH LFSVC 1 "{day}" "lfsvc {escape(__version__)}" "User Commands"'
    # Neither hyphenated nor justified: options and paths stay whole.
    head = f'.\\" Made by packaging/man.py.\n{title}\n.nh\n.ad l\n'
    return head + "\n".join(f".SH {heading}\n{text}" for heading, text in sections.items()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
