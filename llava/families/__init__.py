"""Models of other libraries that are pruned as they are: one file for each family of classes.

    image -> the model's own vision side (read by `capture`) -> VisualTokens -> prune_visual_tokens
          -> `prompts` (shorter prompt, embeddings, positions) -> the model's own language model

`family.Family` is what a file of this package fills in, `attachment` puts it between a caller and a
model.

`contract.VisionLanguageModel` is what everything above knows of a model of any family, LLaVA's own
classes included.
"""
