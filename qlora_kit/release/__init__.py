"""From a trained adapter to a model folder that any server reads: the streamed merge, and its proof."""
