"""Policies: what runs where, decided from what is seen; all behind one interface, with one period."""
