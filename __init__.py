"""MetaEmbed: multimodal retrieval with as many vectors as you choose at search time."""
