// Readers of all quantised formats.
#pragma once
#include "read_int8.h"
#include "read_packed.h"
