"""The contract tests that come with cosched, on what this package brings."""

from cosched.testing import DrafterContract, LossContract, PolicyContract


class TestTokenRecycling(DrafterContract):
    names = ("token_recycling",)


class TestHellinger(LossContract):
    names = ("hellinger",)


class TestWhenLow(PolicyContract):
    names = ("when_low",)
