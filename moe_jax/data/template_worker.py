"""Renders chat templates in a process of its own, one request a line on standard input.

A template comes with a folder that nobody has checked. Jinja's sandbox keeps it from Python's
attributes and from its arguments' contents; the process keeps its time and memory from the
caller, which ends this process when an answer takes too long (`data/chat_template.py`).
"""

import datetime
import functools
import json
import resource
import secrets
import sys

import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of this process
# The words that surround what the template marks by {% generation %}.
BEGIN, END = secrets.token_hex(16), secrets.token_hex(16)


class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} encloses what the assistant generates."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller):
        return f"{BEGIN}{caller()}{END}"


def refuse(message: str) -> None:
    """`raise_exception` of templates."""
    raise jinja2.exceptions.TemplateError(message)


def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """`tojson` of templates, with the arguments that Transformers gives it; it does not escape for
    HTML as Jinja's own does."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment for which the chat templates of Hugging Face folders are written."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = as_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, values: dict, most: int) -> str:
    """The text; raises ValueError, in one line, if the template fails."""
    parts, length = [], 0
    try:
        for part in compiled(template).generate(**values):
            parts.append(part)
            length += len(part)
            if length > most:
                raise ValueError(f"writes more than {most:,} characters")
    except MemoryError:
        raise ValueError(f"needs more than {MEMORY >> 30} GB of memory") from None
    except Exception as error:  # a template can raise any type
        raise ValueError(" ".join(f"fails: {error}".split())[:300]) from None
    return "".join(parts)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"text": render(**request), "begin": BEGIN, "end": END}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
