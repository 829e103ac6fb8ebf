"""Writes all measured parts and pictures: ``make report``, or ``python -m benchmarks.report``."""

from benchmarks.report import drawing, registry


def main() -> None:
    registry.find_parts()
    for document in registry.documents():
        path = registry.ROOT / document
        text = path.read_text()
        if (new := registry.rendered(document, text)) != text:
            path.write_text(new)
            print(f"wrote {document}")
    for entry in registry.PICTURES.values():
        path = registry.ROOT / entry.path
        measured = registry.load(entry.result)
        if measured is None:
            print(f"no {entry.path}: benchmarks/results/{entry.result} is not there")
            continue
        new = drawing.svg(entry.draw(measured))
        if not path.exists() or path.read_text() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new)
            print(f"wrote {entry.path}")


if __name__ == "__main__":
    main()
