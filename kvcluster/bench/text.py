"""Long real text that every Python has: the language's own manual pages."""

from pydoc_data import topics


def long_text() -> str:
    """About 700,000 characters of English prose and code, always in the same order."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
