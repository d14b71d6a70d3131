"""The help: verbs, groups, presets and options with their meanings, printed without importing anything heavy."""

import shutil
import textwrap

from fedsim.cli.groups import default_choices, groups
from fedsim.cli.options import Option, options, plain
from fedsim.errors import UserError, nearest

VERBS = {
    "run": "fine-tune and evaluate: fedsim run [option=value ...]",
    "data": "show who holds what, without training: fedsim data [option=value ...]",
    "cost": "compare what methods send, without weights or data: fedsim cost [option=value,... ...] [--json | --csv]",
    "estimate": "estimate time, memory and bytes: fedsim estimate [option=value ...] [--json]\n"
    "                 [--tokens=N, of an example] [--megabits=N, of a client's line] [--again, to measure this machine anew]",
    "privacy": "compute noise and epsilon, without training: fedsim privacy privacy=example [option=value ...] [--json]",
    "deploy": "a real federation: fedsim deploy init DIR | register DIR | status [DIR] | up --local N [option=value ...]",
    "worker": "what works for one client: fedsim worker client.yaml [--stop]",
    "audit": "run with canaries in the data and prove what leaks: fedsim audit [option=value ...] [--json]",
    "verify": "check the audit log of a run: fedsim verify RUN_FOLDER",
    "help": "show this help, or that of one part: fedsim help run training",
}

_RUN = """\
fedsim run [--multirun] [--cfg] [option=value | group=choice ...]

  --multirun, -m   run every combination of comma-separated values, each in a run folder of its own
  --cfg            print the whole configuration as YAML and stop
  --help, -h       this help; with the name of a group, that group only: fedsim run --help training
"""

_EXAMPLES = """\
Examples
  fedsim run                                              25 clients, Fed-SB, everything embedded
  fedsim run method=centralized federation.rounds=2       the same data in one place
  fedsim run model.path=my/model data=gsm8k data.path=my/folder run_dir=runs/mine
  fedsim run data=instructions data.path=mine.jsonl federation.partition=natural data.client_column=user federation.clients=6
  fedsim run run_dir=runs/mine resume=true                go on after an interruption
  fedsim run --multirun seed=0,1 adapter.rank=8,16 hydra/launcher=joblib hydra.launcher.n_jobs=2
  fedsim run experiment=arithmetic_mistral_7b --cfg       look at a preset
  fedsim cost model=mistral_7b method=fed_sb,fedit,flora  what they would send; commas in any option make rows
  fedsim audit experiment=audit privacy.epsilon=2         a lower bound on epsilon beside the claimed one
  fedsim estimate model=mistral_7b federation.clients=100 how long a run takes on this machine, and what memory
  fedsim data federation.partition=dirichlet federation.alpha=0.1
"""


def overview() -> str:
    """Returns the help of the whole program."""
    verbs = "\n".join(f"  {verb:<8} {meaning}" for verb, meaning in VERBS.items())
    return f"fedsim: federated fine-tuning of language models\n\nVerbs\n{verbs}\n\n{run_help()}"


def run_help(topic: str | None = None) -> str:
    """Returns the help of `fedsim run`, or of one group or section only. Raises UserError if there is no such topic."""
    sections = _by_section()
    if topic is None:
        parts = [_RUN, "Groups and their choices (* is the default)\n" + "\n".join(map(_group, groups())) + "\n", _EXAMPLES]
        parts.insert(2, "Options with their defaults\n" + "\n".join(_section(found) for found in sections.values()) + "\n")
        return "\n".join(parts)
    if topic not in groups() and topic not in sections:
        topics = list(dict.fromkeys([*groups(), *sections]))
        raise UserError(f"Expected one of {', '.join(topics)} after --help, got {topic!r}.{nearest(topic, topics)}")
    parts = [_group(topic)] if topic in groups() else []
    return "\n".join(parts + ([_section(sections[topic])] if topic in sections else [])) + "\n"


def _by_section() -> dict[str, list[Option]]:
    """Returns the options by the first part of their key; those without a dot come under their own names."""
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
    lines = [_line(f"  {option.key}={plain(option.default)}", option.meaning + kind)]
    if option.key.endswith(".name"):  # its members are the choices of the group, told above
        return lines[0]
    return "\n".join(lines + [_line(f"      {member}", meaning) for member, meaning in option.members.items()])


def _line(head: str, text: str, column: int = 42) -> str:
    width = max(80, min(140, shutil.get_terminal_size((120, 24)).columns))
    wrapped = textwrap.wrap(text, width - column) or [""]
    first = f"{head:<{column - 1}} {wrapped[0]}"
    return "\n".join([first.rstrip()] + [" " * column + more for more in wrapped[1:]])
