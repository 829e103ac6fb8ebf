"""What the pages need on their way to ``site/``: mkdocs runs the functions, griffe the class.

The pages stay readable on a code host: a link to a file outside of ``docs/`` works there, and becomes the name of the
file here, where the file is not.
"""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

import griffe

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`([\w.]+)`")


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """Write links to files outside of ``docs/`` as the paths of these files in the repository."""

    def path(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if path.startswith("docs/"):
            return link[0]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    return LINK.sub(path, markdown)


class Roles(griffe.Extension):
    """Turns ``:func:`lesa.enable``` in a docstring into a link, where a page of the reference has the name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change every docstring of a package before it is read."""
        for found in _walk(pkg):
            if found.docstring is not None:
                found.docstring.value = ROLE.sub(lambda role, found=found: _link(role[1], found), found.docstring.value)


def _walk(found: griffe.Object) -> Iterator[griffe.Object]:
    yield found
    for member in found.members.values():
        if isinstance(member, griffe.Object):  # and no alias, whose target is walked where it is defined
            yield from _walk(member)


def _link(name: str, found: griffe.Object) -> str:
    return f'<autoref identifier="{_full(name, found)}" optional><code>{name}</code></autoref>'


def _full(name: str, found: griffe.Object) -> str:
    """The full name of what a docstring calls by a short one: of its own class or module, or public."""
    first = name.partition(".")[0]
    if first in (found.package.name, "lesa", "lesa_kernels"):
        return name
    owner: griffe.Object | None = found
    while owner is not None:
        if first in owner.members and not owner.members[first].is_alias:
            return f"{owner.path}.{name}"
        owner = owner.parent
    return f"{found.package.name}.{name}"
