"""Loaders of accelerate, sharded over data ranks in place of all ranks."""

from typing import Any

from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

from ring_sp.integrations.huggingface.ring import HuggingFaceRing


def over_data_ranks(loader: Any, ring: HuggingFaceRing, is_evaluation: bool = False) -> Any:
    """The loader, in place, with the same batches on all ranks of a ring, those that it would have
    in a world of as many processes as there are data ranks.

    To evaluate, or with one data rank, no sample is repeated to fill the last batch. Raises
    NotImplementedError for loaders that are sharded in another way than by accelerate's
    BatchSamplerShard and IterableDatasetShard, and for an IterableDataset to evaluate on.
    """
    if ring.manager.size("data_sequence") == 1:
        return loader
    holders = (getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))
    shards = [x for x in holders if isinstance(x, BatchSamplerShard | IterableDatasetShard)]
    if not shards:
        raise NotImplementedError(
            f"a ring needs the same batches on all its ranks, and does not know how "
            f"{type(loader).__name__} shards a {type(getattr(loader, 'dataset', None)).__name__}. "
            f"For an iterable dataset set accelerator_config={{'dispatch_batches': False}}; of "
            f"`datasets`, use one with fewer shards than processes, or a map-style dataset."
        )
    shard = shards[0]
    shard.num_processes, shard.process_index = ring.manager.size("data"), ring.manager.rank("data")
    if is_evaluation and isinstance(shard, IterableDatasetShard):
        raise NotImplementedError(
            "an IterableDataset to evaluate on would be filled up with samples from its start: "
            "use one with a length"
        )
    if isinstance(shard, BatchSamplerShard) and (is_evaluation or shard.num_processes == 1):
        shard.even_batches = False
    return loader
