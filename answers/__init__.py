"""What an answer means: where it stands in a response, and which other answers are the same.

This folder imports nothing else of the project. It stays beside math-verify, which judges single
expressions here: of 17 pairs that users of math-verify reported, math-verify alone decides 7 as
they ask, with 5 false rights; the rules of this folder 13, with none.
"""

from answers.equality import canonical, equal, extract_answer, gradable

__all__ = ["canonical", "equal", "extract_answer", "gradable"]
