"""The help: commands, groups, presets and options with their meanings, printed without importing anything heavy."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedsim.cli.calling import width
from fedsim.cli.groups import default_choices, groups
from fedsim.cli.options import Option, options
from fedsim.errors import UserError, nearest
from fedsim.plain import option_text


@dataclass(frozen=True)
class Command:
    """One command: its meaning, usage, flags and examples.

    A flag is written as typed: "--json", "--cfg, -c" with a short form, "--tokens=N" with a value. `fedsim` accepts only these and --help.
    """

    meaning: str
    usage: str
    flags: dict[str, str] = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    def spellings(self) -> dict[str, str]:
        """Maps each spelling of a flag to the first one in `flags`: {"-c": "--cfg", "--tokens": "--tokens=N"}."""
        forms = [flag.split(", ") for flag in self.flags]
        return {spelling.partition("=")[0]: first for first, *more in forms for spelling in (first, *more)}


_JSON = {"--json": "print JSON in place of tables"}
_TOPIC = {"--help, -h": "this help; with the name of a group, that group only: fedsim run --help training"}
COMMANDS = {
    "run": Command(
        "fine-tune and evaluate",
        "fedsim run [--multirun] [--cfg] [option=value | group=choice ...]",
        {
            "--multirun, -m": "run every combination of comma-separated values, each in a run folder of its own",
            "--cfg, -c": "print the whole configuration as YAML and stop",
            **_TOPIC,
        },
        (
            "fedsim run                                              25 clients, Fed-SB, everything embedded",
            "fedsim run method=centralized federation.rounds=2       the same data in one place",
            "fedsim run model.path=my/model data=gsm8k data.path=my/folder run_dir=runs/mine",
            "fedsim run data=instructions data.path=mine.jsonl federation.partition=natural data.client_column=user federation.clients=6",
            "fedsim run model=minilm data=classification data.path=mine.csv   rows of a text and a label",
            "fedsim run run_dir=runs/mine resume=true                continue after an interruption",
            "fedsim run --multirun seed=0,1 adapter.rank=8,16 hydra/launcher=joblib hydra.launcher.n_jobs=2",
            "fedsim run experiment=arithmetic_mistral_7b --cfg       look at a preset",
        ),
    ),
    "data": Command(
        "show each client's data, without training",
        "fedsim data [option=value ...]",
        {},
        ("fedsim data federation.partition=dirichlet federation.alpha=0.1",),
    ),
    "cost": Command(
        "compare what methods send, without weights or data",
        "fedsim cost [option=value,... ...] [--json | --csv]",
        {**_JSON, "--csv": "print comma-separated values in place of tables"},
        ("fedsim cost model=mistral_7b method=fed_sb,fedit,flora  what they would send; commas in any option make rows",),
    ),
    "estimate": Command(
        "estimate time, memory and bytes",
        "fedsim estimate [option=value ...] [--json] [--tokens=N] [--megabits=N] [--again]",
        {
            **_JSON,
            "--tokens=N": "tokens of an example, where the data is not here",
            "--megabits=N": "megabits a second of a client's connection",
            "--again": "measure this machine again",
        },
        ("fedsim estimate model=mistral_7b federation.clients=100 how long a run takes on this machine, and what memory",),
    ),
    "privacy": Command(
        "compute noise and epsilon, without training",
        "fedsim privacy privacy=example | privacy=client [option=value ...] [--json]",
        _JSON,
        ("fedsim privacy privacy=example privacy.epsilon=2",),
    ),
    "audit": Command(
        "run with canaries in the data and prove what leaks",
        "fedsim audit [option=value ...] [--json]",
        _JSON,
        ("fedsim audit experiment=audit privacy.epsilon=2         a lower bound on epsilon beside the claimed one",),
    ),
    "verify": Command(
        "check the audit log of a run, and its results against it", "fedsim verify RUN_FOLDER", {}, ("fedsim verify runs/mine",)
    ),
    "deploy": Command(
        "a federation of several machines", "fedsim deploy init DIR | register DIR | status [DIR] | up --local N [option=value ...]"
    ),
    "worker": Command(
        "run or stop one client's worker",
        "fedsim worker client.yaml [--stop]",
        {"--stop": "end the worker that runs for this file"},
        ("fedsim worker clients/client-0/client.yaml",),
    ),
    "help": Command(
        "show this help, that of a command, or a group's", "fedsim help [COMMAND | run GROUP]", {}, ("fedsim help run training",)
    ),
}
WITH_OPTIONS = ("data", "cost", "estimate", "privacy", "audit")
"""Commands that take the options of `run`."""


def overview() -> str:
    """Returns the help of the whole program: its commands, examples and groups of options."""
    commands = "\n".join(f"  {name:<9} {command.meaning}" for name, command in COMMANDS.items())
    topics = textwrap.fill(", ".join(topics_of_run()), 100, initial_indent="  ", subsequent_indent="  ")
    return (
        f"fedsim: federated fine-tuning of language models\n\nCommands (fedsim COMMAND --help explains one)\n{commands}\n\n"
        f"{_examples(example for command in COMMANDS.values() for example in command.examples)}\n"
        f"Groups of options (fedsim help run GROUP shows one, fedsim help run all of them)\n{topics}\n"
    )


def command_help(name: str) -> str:
    """Returns the help of one command."""
    command = COMMANDS[name]
    if name == "run":
        return run_help()
    parts = [f"{command.usage}\n  {command.meaning}\n", _flags(command), _examples(command.examples) if command.examples else ""]
    if name in WITH_OPTIONS:
        parts.append("Options and groups are those of fedsim run: fedsim help run shows all, fedsim help run training one group.\n")
    return "\n".join(filter(None, parts))


def topics_of_run() -> list[str]:
    """Returns the names of all groups and sections of options."""
    return list(dict.fromkeys([*groups(), *_by_section()]))


def _flags(command: Command) -> str:
    return "".join(f"  {flag:<16} {meaning}\n" for flag, meaning in command.flags.items())


def _examples(examples: Iterable[str]) -> str:
    return "Examples\n" + "".join(f"  {example}\n" for example in examples)


def run_help(topic: str | None = None) -> str:
    """Returns the help of `fedsim run`, or of one group or section only. Raises UserError if there is no such topic."""
    sections = _by_section()
    if topic is None:
        run = COMMANDS["run"]
        return "\n".join(
            [
                f"{run.usage}\n",
                _flags(run),
                "Groups and their choices (* is the default)\n" + "\n".join(map(_group, groups())) + "\n",
                "Options with their defaults\n" + "\n".join(_section(found) for found in sections.values()) + "\n",
                _examples(run.examples),
            ]
        )
    if topic not in topics_of_run():
        raise UserError(f"Expected one of {', '.join(topics_of_run())} after --help, got {topic!r}.{nearest(topic, topics_of_run())}")
    parts = [_group(topic)] if topic in groups() else []
    return "\n".join(parts + ([_section(sections[topic])] if topic in sections else [])) + "\n"


def _by_section() -> dict[str, list[Option]]:
    """Groups the options by the first part of their key; an option without a dot is its own section."""
    found: dict[str, list[Option]] = {}
    for option in options().values():
        found.setdefault(option.key.partition(".")[0], []).append(option)
    return found


def _group(group: str) -> str:
    default = default_choices().get(group, "basic")
    lines = [_line(f"    {'*' if choice == default else ' '} {choice}", meaning) for choice, meaning in groups()[group].items()]
    return "\n".join([f"  {group}=", *lines])


def _section(found: list[Option]) -> str:
    return "\n".join(map(_option, found))


def _option(option: Option) -> str:
    kind = "" if option.members else f" [{option.kind}]"
    lines = [_line(f"  {option.key}={option_text(option.default)}", option.meaning + kind)]
    if option.key.endswith(".name"):  # its members are the choices of the group, listed above
        return lines[0]
    return "\n".join(lines + [_line(f"      {member}", meaning) for member, meaning in option.members.items()])


def _line(head: str, text: str, column: int = 42) -> str:
    wrapped = textwrap.wrap(text, width() - column) or [""]
    first = f"{head:<{column - 1}} {wrapped[0]}"
    return "\n".join([first.rstrip()] + [" " * column + more for more in wrapped[1:]])
