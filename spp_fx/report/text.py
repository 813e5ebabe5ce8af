"""Names from files that are not trusted, made fit for a terminal, a log or XML."""


def printable(text: str) -> str:
    """The text with control characters, line ends among them, spelt as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
