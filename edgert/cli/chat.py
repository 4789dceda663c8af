"""`edgert chat`: a conversation, or one reply with -p or -f; the reply is all stdout gets."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgert.cli.chat_state import ChatState, sampling_params
from edgert.cli.opening import OpenEngine, open_engine, read_stream, read_text
from edgert.cli.progress import ProgressListener
from edgert.cli.reply import Spoken, speak, statistics_line
from edgert.cli.terminal import printable
from edgert.errors import Cancelled, ConfigError, LinkError
from edgert.receipt import as_row

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ChatOptions, PromptFlags


def run(options: ChatOptions, context: Context, load: OpenEngine = open_engine) -> int:
    """Chat and return the exit code."""
    from edgert.cli.chat_repl import Repl

    one_shot = _one_shot_prompt(options.prompt, context)
    system = _system_prompt(options.prompt)
    sampling_params(options.sampling)
    with (
        ProgressListener(context, quiet=options.output.json) as progress,
        load(options, context, progress) as engine,
    ):
        progress.clear()
        state = ChatState(engine, options, context, progress, system=system)
        if one_shot is None:
            return Repl(state).run()
        return answer_once(state, one_shot)


def answer_once(state: ChatState, prompt: str) -> int:
    """Answer one prompt and return the exit code."""
    state.say_to_model(prompt)
    if state.options.output.json:
        try:
            spoken = reply(state, lambda _: None)
        except LinkError as error:
            if error.said is not None:
                spoken = Spoken(error.said, "link", interrupted=False)
                print(_as_json(state, spoken), file=state.context.stdout, flush=True)
            raise
        print(_as_json(state, spoken), file=state.context.stdout, flush=True)
    else:
        spoken = reply(state, writer(state))
    return Cancelled.exit_code if spoken.interrupted else 0


def reply(state: ChatState, show: Callable[[str], None]) -> Spoken:
    """Let the model answer what was said last, and print the statistics."""

    def begin(text: str) -> None:
        state.progress.clear()
        show(text)

    try:
        spoken = speak(state.engine, state.start_reply, begin)
    except LinkError as error:
        if error.said:
            show("\n")
        raise
    if spoken.text or not spoken.interrupted:
        show("\n")
    if spoken.interrupted:
        state.context.say("[stopped]")
    state.heard(spoken)
    last = state.engine.stats().last
    cut_short = spoken.interrupted and not spoken.text
    if last is not None and not cut_short and not state.options.output.json:
        state.context.say(statistics_line(last))
        if spoken.finish_reason == "length" and last.n_generated_tokens != state.n_predict:
            state.context.say(
                f"[cut short: the context of {state.engine.n_ctx} tokens is full; "
                "/clear, a larger -c or --overflow shift make room]"
            )
    return spoken


def writer(state: ChatState) -> Callable[[str], None]:
    """Write text to stdout; on a terminal without control characters a model might send."""
    out = state.context.stdout

    def write(text: str) -> None:
        out.write(printable(text, out))
        out.flush()

    return write


def _as_json(state: ChatState, spoken: Spoken) -> str:
    last = state.engine.stats().last
    stats = {} if last is None else dataclasses.asdict(last)
    stats.pop("receipt", None)  # beside them, with its sums
    result = {
        "model": state.engine.model_name,
        "text": spoken.text,
        "finish_reason": spoken.finish_reason,
        "stats": stats,
        "receipt": as_row(None if last is None else last.receipt),
    }
    return json.dumps(result, ensure_ascii=False)


def _one_shot_prompt(flags: PromptFlags, context: Context) -> str | None:
    parts = []
    if flags.file is not None:
        parts.append(read_text(flags.file))
    if flags.prompt == "-":
        parts.append(_read_stdin(context))
    elif flags.prompt is not None:
        parts.append(flags.prompt)
    if not parts:
        return None
    prompt = "\n\n".join(parts)
    if not prompt.strip() and not flags.raw:
        raise ConfigError("the prompt is empty", hint='write one, such as -p "Hello"')
    return prompt


def _read_stdin(context: Context) -> str:
    if context.stdin.isatty():
        context.say("reading the prompt from the terminal, Ctrl-D ends it")
    if context.stdin is sys.stdin:
        return read_stream(sys.stdin.buffer, "stdin")
    return context.stdin.read()


def _system_prompt(flags: PromptFlags) -> str | None:
    if flags.system_prompt_file is not None:
        return read_text(flags.system_prompt_file).strip()
    return flags.system_prompt
