"""Make llava-tiny from nothing: tower, data, tokenizer, start, checkpoint folder."""
