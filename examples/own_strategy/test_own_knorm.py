import own_knorm  # noqa: F401  # registers the stage where the package is not installed

from kvatlas.testing import Retelling, Token, check_books, check_full_budget, check_parity, check_retold


class Retold(Retelling):
    def after_attention(self, cache: list[Token]) -> None:
        while self.position >= self.prompt_tokens - 1 and len(cache) > 20:
            cache.remove(max(cache, key=lambda token: float(token.key.norm())))


def test_own_knorm() -> None:
    check_retold("own_knorm(budget=20)", Retold)
    check_parity("own_knorm(budget=20)")
    check_full_budget("own_knorm(budget=100)")
    check_books("own_knorm(budget=20)")
