"""What libraries print of their own accord: left out, since the start-up log says what was found."""

import logging
import warnings

_LIBRARIES = ("megatron", "torch", "deepspeed", "apex", "numpy", "webdataset")


def hush_libraries() -> None:
    """Leave out the libraries' warnings; to be called before they are imported, where most of them come."""
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
