"""What all tests share."""

from hypothesis import settings

# a machine that is busy, or the first example that builds a tokenizer, is no defect
settings.register_profile("crosslora", deadline=None)
settings.load_profile("crosslora")
