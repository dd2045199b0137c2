"""The Jinja templates of a target: they loop over prepared objects, and a name they do not find is an error."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2


def render(package: str, name: str, **context: Any) -> str:
    """The template ``templates/<name>.j2`` of a package, rendered."""
    return _environment(package).get_template(f"{name}.j2").render(**context)


@lru_cache(maxsize=4)
def _environment(package: str) -> jinja2.Environment:
    folder = resources.files(package).joinpath("templates")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
