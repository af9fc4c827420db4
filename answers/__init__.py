"""What an answer means: where it stands in a response, and which other answers are the same."""

from answers.equality import canonical, equal, extract_answer, gradable

__all__ = ["canonical", "equal", "extract_answer", "gradable"]
