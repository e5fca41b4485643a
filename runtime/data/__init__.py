"""What a run trains on: text as bytes, or Megatron's indexed datasets; imports no torch."""
