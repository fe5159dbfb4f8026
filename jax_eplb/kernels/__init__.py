"""Matrix products of rows with the weights of their group."""

from jax_eplb.kernels.activation import ACTIVATIONS as ACTIVATIONS
from jax_eplb.kernels.activation import Activation as Activation
from jax_eplb.kernels.activation import activation_named as activation_named
from jax_eplb.kernels.counting_sort import Sorted as Sorted
from jax_eplb.kernels.counting_sort import counting_sort as counting_sort
from jax_eplb.kernels.grouped_matmul import IMPLEMENTATIONS as IMPLEMENTATIONS
from jax_eplb.kernels.grouped_matmul import check_implementation as check_implementation
from jax_eplb.kernels.grouped_matmul import grouped_matmul as grouped_matmul
from jax_eplb.kernels.logits import logits as logits
from jax_eplb.kernels.row_blocks import by_row_blocks as by_row_blocks
from jax_eplb.kernels.take_rows import take_rows as take_rows
from jax_eplb.kernels.top_k_sort import TopKSorted as TopKSorted
from jax_eplb.kernels.top_k_sort import top_k_sort as top_k_sort
