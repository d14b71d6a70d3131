"""Conversations in the form that a model was taught: its tokenizer's chat template."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from fedsim.errors import UserError
from fedsim.types import AnyExample, Example, Turn

DATE = datetime(2024, 7, 26)
"""What templates that tell the model the date are given: with today's, a run would be another one tomorrow."""

_FORMATTED = "".join(f" | replace('%{part}', '{DATE.strftime(f'%{part}')}')" for part in "aAbBdHIjmMpSyY")
_FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FORMATTED} }}}}{{%- endmacro -%}}"
SAID = "said"


def in_turns(example: Example, tokenizer: Any) -> bool:
    """Whether the example is a conversation and the tokenizer has a template for those."""
    return bool(example.turns and getattr(tokenizer, "chat_template", None))


def rendered(turns: Sequence[Turn], tokenizer: Any, *, answered: bool = False) -> str:
    """Returns the turns in the template's form, up to where the assistant's next one begins unless they are `answered` already.

    Where the template knows no system, what that says stands before the first user's turn. Raises UserError for what it refuses even so.
    """
    try:
        return _by_template(turns, tokenizer, answered)
    except Exception as error:  # a template raises what it likes
        first = next((place for place, turn in enumerate(turns) if turn.role == "user"), 0)
        system = [turn.content for turn in turns[:first] if turn.role == "system"]
        if system:
            told = Turn("user", "\n\n".join([*system, turns[first].content]))
            return rendered([told, *turns[first + 1 :]], tokenizer, answered=answered)
        raise UserError(
            f"The model's chat template refuses a conversation of {', '.join(turn.role for turn in turns)}: {error}. "
            "Leave such rows out, or take a tokenizer without a template, with which conversations have Alpaca's form."
        ) from error


def _by_template(turns: Sequence[Turn], tokenizer: Any, answered: bool) -> str:
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    said = [turn._asdict() for turn in turns]
    thinking = {"enable_thinking": False}  # templates that do not know it do not look at it
    return str(tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, add_generation_prompt=not answered, **thinking))


def end_of_turn(tokenizer: Any) -> int:
    """Returns the token with which the template ends an assistant's turn, the end-of-sequence token where it has no token of its own."""
    whole = rendered([Turn("user", SAID), Turn("assistant", SAID)], tokenizer, answered=True)
    after = tokenizer(whole.rpartition(SAID)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), tokenizer.eos_token_id)


def shorter(turns: Sequence[Turn]) -> list[Turn] | None:
    """Returns the turns without the oldest exchange, what the system says kept; None where a single question is left."""
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if len(asked) < 2:
        return None
    return [turn for place, turn in enumerate(turns) if place >= asked[1] or (turn.role == "system" and place < asked[0])]


def check(examples: Iterable[AnyExample], tokenizer: Any) -> None:
    """Raises UserError where the template refuses a conversation, by who says its turns."""
    known: set[tuple[str, ...]] = set()
    for example in examples:
        if isinstance(example, Example) and in_turns(example, tokenizer):
            roles = tuple(turn.role for turn in example.turns)
            if roles not in known:
                rendered(example.turns, tokenizer)
                known.add(roles)
