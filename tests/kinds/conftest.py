from tests.kinds.case import toy

__all__ = ["toy"]
