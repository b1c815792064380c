"""Every image-text and classification format in and out; class texts."""
