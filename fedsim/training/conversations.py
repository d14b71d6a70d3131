"""Renders conversations for a model: by its tokenizer's chat template, or in Alpaca's form if it has none."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from fedsim.errors import UserError
from fedsim.types import AnyExample, Example, Turn

ALPACA_OPENING = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_MARKS = {"user": "### Instruction:\n", "assistant": "### Response:"}

DATE = datetime(2024, 7, 26)
"""The date given to templates that mention it: with today's date, the same run would differ tomorrow."""

_FORMATTED = "".join(f" | replace('%{part}', '{DATE.strftime(f'%{part}')}')" for part in "aAbBdHIjmMpSyY")
_FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FORMATTED} }}}}{{%- endmacro -%}}"
SAID = "said"


def has_template(tokenizer: Any) -> bool:
    """Returns whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def in_alpaca(turns: Sequence[Turn]) -> str:
    """Returns the turns in Alpaca's form, ending where the assistant's next turn begins; one question is an instruction."""
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    said = "\n\n".join(ALPACA_MARKS[turn.role] + turn.content for turn in turns if turn.role != "system")
    opening = f"{system}\n\n" if system else ALPACA_OPENING
    return f"{opening}{said}\n\n{ALPACA_MARKS['assistant']}"


def rendered(turns: Sequence[Turn], tokenizer: Any, *, answered: bool = False) -> str:
    """Returns the turns in the template's form, ending where the assistant's next turn begins unless they are `answered`.

    If the template refuses the system role, or refuses it at that place, system text goes before the next question. Raises UserError for
    turns that it refuses even then.
    """
    try:
        return _by_template(turns, tokenizer, answered)
    except Exception as error:  # a template may raise anything
        told = _without_system(turns)
        if told != list(turns):
            return rendered(told, tokenizer, answered=answered)
        raise UserError(
            f"The model's chat template refuses a conversation of {', '.join(turn.role for turn in turns)}: {error}. "
            "Leave such rows out, or take a tokenizer without a template, with which conversations have Alpaca's form."
        ) from error


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    found: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "system":
            waiting.append(turn.content)
        elif turn.role == "user":
            found.append(Turn("user", "\n\n".join([*waiting, turn.content])))
            waiting = []
        else:
            found.append(turn)
    return found


def _by_template(turns: Sequence[Turn], tokenizer: Any, answered: bool) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    said = [turn._asdict() for turn in turns]
    thinking = {"enable_thinking": False}  # other templates ignore it
    return str(tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, add_generation_prompt=not answered, **thinking))


def end_of_turn(tokenizer: Any) -> int:
    """Returns the token with which the template ends an assistant's turn, the end-of-sequence token if it has none of its own."""
    whole = rendered([Turn("user", SAID), Turn("assistant", SAID)], tokenizer, answered=True)
    after = tokenizer(whole.rpartition(SAID)[2], add_special_tokens=False)["input_ids"]
    added = {token for token, text in tokenizer.added_tokens_decoder.items() if str(text).strip()}  # some have runs of spaces
    own = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id, tokenizer.bos_token_id}
    return next((token for token in after if token in own), tokenizer.eos_token_id)


def shorter(turns: Sequence[Turn]) -> list[Turn] | None:
    """Returns the turns without the oldest exchange, keeping system turns before it; None if only one question is left."""
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(asked) < 2:
        return None
    return [turn for place, turn in enumerate(turns) if place >= asked[1] or (turn.role == "system" and place < asked[0])]


def check(examples: Iterable[AnyExample], tokenizer: Any) -> None:
    """Raises UserError if the template refuses a conversation; renders one conversation for each sequence of roles."""
    known: set[tuple[str, ...]] = set()
    for example in examples if has_template(tokenizer) else ():
        if isinstance(example, Example) and example.turns:
            roles = tuple(turn.role for turn in example.turns)
            if roles not in known:
                rendered(example.turns, tokenizer)
                known.add(roles)
