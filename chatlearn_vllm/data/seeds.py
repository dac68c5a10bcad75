"""Which seed draws which of a job's responses?"""

import hashlib


def sample_seed(run_seed: int, ordinal: int, is_eval: bool) -> int:
    """Seed of the `ordinal`-th response of a job; vLLM adds the index among a prompt's responses.

    Consecutive ordinals give consecutive seeds from a start that depends on the run's seed, so no
    two of the first 2**32 responses share one, not even where a generator keeps 32 bits only.
    """
    digest = hashlib.sha256(f"{run_seed}/{'eval' if is_eval else 'train'}".encode()).digest()
    return int.from_bytes(digest[:7], "big") + ordinal  # far below 2**63, vLLM's largest
