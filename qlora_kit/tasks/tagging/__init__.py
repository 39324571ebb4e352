"""Token classification: each word of a sentence gets a tag."""
