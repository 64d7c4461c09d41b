"""What SGLang sees of the KV memory. Only here, in `patches` and in `plugin` is SGLang imported."""
