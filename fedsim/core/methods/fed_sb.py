"""Fed-SB (arXiv 2502.15436): clients train R of LoRA-SB on common bases B and A; the server averages R, which is exact."""

from fedsim.core.aggregation import weighted_mean
from fedsim.core.methods.method import Method

FED_SB = Method(
    name="fed_sb",
    summary="LoRA-SB at every client, exact averaging of the small R matrices",
    trained=("R",),
    aggregate=weighted_mean,
)
