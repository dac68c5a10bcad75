"""Is a response the right answer to an arithmetic problem?"""


def score(response: str, answer: str) -> float:
    """Reward a response whose first line is the answer, 1.0, and nothing else, 0.0.

    Spaces around the line do not matter; leading zeros, signs and further digits do. What follows
    the first line break is not looked at.

    Args:
        response: text the policy generated after a prompt such as "27+48=".
        answer: the right number, such as "75".
    """
    first_line, _, _ = response.partition("\n")
    return 1.0 if first_line.strip() == answer else 0.0
