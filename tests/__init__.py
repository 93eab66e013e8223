"""Tests of qsun: tiny real models, real files, the command line in this process."""
