"""Fine-tune a MetaEmbed model on your own pairs: any backbone, text and images, LoRA or in full, one GPU or many.

    python examples/train.py --backbone Qwen/Qwen2.5-VL-3B-Instruct --dataset you/your-pairs --output_dir outputs/train
        --per_device_train_batch_size 256 --mini_batch_size 8 --bf16 --gradient_checkpointing --learning_rate 1e-4

    accelerate launch --config_file examples/fsdp.yaml examples/train.py ...    several GPUs, sharded
    torchrun --nproc-per-node 8 examples/train.py ... --gather_across_devices   several GPUs, a whole model on each
    python examples/train.py ... --resume                                       continue after a kill
    python examples/train.py ... --push_to_hub --hub_model_id you/your-model    publish the result

The dataset has the columns `query`, `positive` and any number of `negative`, `negative_1`, ..., or `negatives` with a
list in each row. Each holds text or images, and `query_image`, `positive_image`, ... add images to the text of the
same name (in JSON: paths, relative to the file). `python examples/train.py --help` lists all options, including
everything that sentence-transformers' training arguments offer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

try:
    from metaembed.cards.card import write_eval_results
    from metaembed.evaluation.budgets import budget_table
    from metaembed.sentence_metaembed import to_multi_vector_encoder
    from metaembed.training.arguments import parse_arguments
    from metaembed.training.data import load_pairs
    from metaembed.training.lora import merge_adapter
    from metaembed.training.run import (
        check_run,
        keep_the_best,
        learning_rates,
        make_loss,
        make_model,
        one_line_errors,
        publish,
    )
    from metaembed.training.trainer import MetaEmbedTrainer, last_checkpoint
except ImportError as error:  # of what only training needs
    raise SystemExit(f"train.py: error: {error}: pip install 'metaembed[train]'") from error

logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, save and publish."""
    arguments, training = parse_arguments(argv, __doc__.splitlines()[0])
    push, training.push_to_hub = training.push_to_hub, False  # the result is published, not every checkpoint
    final = Path(training.output_dir) / "final"
    set_seed(training.seed)

    with one_line_errors():
        check_run(arguments, training)

        # 1. Load the pairs.
        pairs, held_out = load_pairs(
            arguments.dataset,
            arguments.dataset_config,
            arguments.train_split,
            arguments.eval_split,
            arguments.eval_size,
            arguments.query_column,
            arguments.positive_column,
        )
        logger.info(f"{len(pairs)} rows of {pairs.columns}")

        # 2. Make the model. All vectors are trained, whatever number it returns by default.
        model = make_model(arguments, training)
        defaults = model.config.query_num_meta, model.config.document_num_meta
        model.config.query_num_meta = model.config.document_num_meta = None
        encoder = to_multi_vector_encoder(model)

        # 3. Choose the loss: one term for every budget, with GradCache where the batch does not fit.
        loss = make_loss(encoder, arguments)

        # 4. Evaluate at every budget whenever a checkpoint is saved, and keep the best.
        evaluator = None
        if held_out is not None:
            evaluator = held_out.evaluator(model, training.per_device_eval_batch_size)
            keep_the_best(training, evaluator)

    # 5. Train.
    training.learning_rate_mapping = learning_rates(arguments, model)
    trainer = MetaEmbedTrainer(
        model=encoder, args=training, train_dataset=pairs.inputs(), loss=loss, evaluator=evaluator
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(training.output_dir) if arguments.resume else None)

    # 6. Evaluate what will be saved: merged, and without the autocast of the training (FSDP's cannot be switched off).
    trainer.accelerator.unwrap_model(encoder, keep_fp32_wrapper=False)
    if arguments.merge and arguments.lora:
        merge_adapter(model)
    results = evaluator(encoder) if evaluator is not None else {}
    quality = evaluator.budget_metrics(results) if results else {}

    # 7. Save and publish.
    model.config.query_num_meta, model.config.document_num_meta = defaults
    encoder.model_card_data.license = arguments.license
    trainer.save_model(str(final))
    if not trainer.is_world_process_zero():
        return
    if quality:
        print(
            budget_table(
                {**quality, **evaluator.token_metrics(results)}, ["ndcg@10", "recall@1", "recall@5", "mrr@10"]
            )
        )
        if not Path(arguments.dataset).exists():  # a Hub dataset, whose page can show the results
            task = f"{arguments.dataset_config or 'default'} {arguments.eval_split or arguments.train_split}"
            notes = "" if arguments.eval_split else f"on {len(held_out)} rows held out of the split"
            write_eval_results(final, arguments.dataset, task, quality, "ndcg@10", notes)
    if push:
        print(publish(final, training))
    logger.info(f"saved to {final}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    main()
