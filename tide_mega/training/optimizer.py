"""Which parameters share a learning rate and a weight decay."""

from torch import nn

from tide_mega.config.schema import OptimConfig
from tide_mega.parallel.engine_settings import ParameterGroup

TABLES = "tables"


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[ParameterGroup]:
    """Split into matrices (decayed), gains of norms (never decayed) and memory tables (own settings)."""
    matrices, gains, tables = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("tables_WKD", "absent_tables")):
            tables.append(parameter)
        elif parameter.ndim == 1 or name.endswith("gains_KD"):
            gains.append(parameter)
        else:
            matrices.append(parameter)
    table_decay = optim.weight_decay if optim.table_weight_decay is None else optim.table_weight_decay
    return [
        ParameterGroup("matrices", matrices, optim.weight_decay),
        ParameterGroup("gains", gains, 0.0),
        ParameterGroup(TABLES, tables, table_decay, optim.table_lr_multiplier, every_microbatch=False),
    ]
