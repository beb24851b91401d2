def apply(model, **kwargs):
    raise NotImplementedError


def revert(model):
    raise NotImplementedError
