"""From any backbone to a MetaEmbed model."""
