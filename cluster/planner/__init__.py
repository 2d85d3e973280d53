"""Pure arithmetic over shapes and inventories: which layout fits, what each rank holds, where it goes."""
