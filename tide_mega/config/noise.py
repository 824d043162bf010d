"""What libraries print of their own accord: left out, since the start-up log says what was found."""

import logging
import warnings

_LIBRARIES = ("megatron", "torch", "deepspeed", "apex", "numpy", "webdataset")

_WARNS_BY_LOG = (
    "megatron.core.models.gpt.gpt_model",  # from 0.19 on each chunk says that GPTModel is deprecated
    "torch.utils.cpp_extension",  # a build for CUDA says on a machine without a GPU that it found nvcc
)
"""Modules whose warnings go to the log."""


def hush_libraries() -> None:
    """Leave out the libraries' warnings; to be called before they are imported, where most of them come."""
    for library in _LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for module in _WARNS_BY_LOG:
        logging.getLogger(module).setLevel(logging.ERROR)
