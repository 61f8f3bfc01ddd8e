"""The errors a caller can tell apart. Each carries one line: what is wrong, where, and the cure."""


class BadModelFile(ValueError):
    """A checkpoint, config or tokenizer file that is not a Gemma 2 this program can run exactly."""


class ContextOverflow(ValueError):
    """More positions were asked for than the context or the cache holds."""


class NonFiniteError(RuntimeError):
    """A NaN or an infinity where a finite number must be."""


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, at most 200 characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def said_of_device(error: BaseException) -> str:
    """What PyTorch says of a device that it does not take, without its list of all 22 kinds."""
    line = first_line(error)
    return "PyTorch knows no such device" if line.startswith("Expected one of") else line
