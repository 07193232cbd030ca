"""Multi-token prediction's shift of tokens, labels and loss mask, in every layout."""

from collections.abc import Callable

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from ring_sp.integrations.megatron.ring import MegatronRing, RingSequenceParams


class RollTokens:
    """Takes the place of Megatron's `roll_tensor`, which knows its own zigzag order only."""

    def __init__(self, ring: Callable[[], MegatronRing]) -> None:
        self._ring = ring

    def __call__(
        self,
        tensor: Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: ProcessGroup | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(`tensor` with each token's next in its place and 0 in that of a document's last, the sum
        of this rank's part); collective over the ring.

        Raises NotImplementedError for a shift by anything but one token to the left.
        """
        if tensor is None:
            return None, None
        if shifts != -1:
            raise NotImplementedError(f"tokens are shifted by -1; got {shifts}")
        place = self._place(tensor.shape[dims], cp_group, packed_seq_params)
        sequence = place.sequence
        assert sequence is not None
        whole = sequence.unshard(tensor, dims).roll(-1, dims)
        whole.select(dims, -1).zero_()
        for start in place.starts:
            if start:
                whole.select(dims, start - 1).zero_()
        rolled = sequence.shard(whole, dims)
        return rolled, rolled.sum()

    def _place(
        self, local_len: int, group: ProcessGroup | None, params: PackedSeqParams | None
    ) -> RingSequenceParams:
        ring = self._ring()
        if isinstance(params, RingSequenceParams) and params.sequence is not None:
            return params
        if params is not None and params.qkv_format == "thd":
            return ring.packed(params)
        alone = PackedSeqParams(qkv_format="sbhd", local_cp_size=1)
        topology = ring.topology_of(alone if group is None else params)
        sequence = ring.sequence(local_len * topology.size, None, topology)
        return RingSequenceParams(sequence=sequence)
