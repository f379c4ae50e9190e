// SPDX-License-Identifier: GPL-2.0
/*
 * The control region, every access to which is trapped: the write that asks for something returns when it is done.
 *
 * Where the interface leaves a choice: a state without LOGGING ends the session, even if it is the state already, and
 * all memory counts as dirty again. Data is loaded in STOP only, EBUSY otherwise, and a device with a load that was begun
 * stays in STOP until it is complete or the device is reset. Outside LOGGING no page of guest memory is dirty.
 */
#include <linux/bitmap.h>
#include <linux/overflow.h>
#include <linux/random.h>

#include "four_region.h"

static void fr_end_session(struct fr_device *fr)
{
	fr_forget_captures(fr);
	fr_forget_guest(fr);
}

static int fr_set_state(struct fr_device *fr, u32 state)
{
	if (state & ~FR_STATE_MASK)
		return -EINVAL;
	if (fr->loading.begun && state != FR_STATE_STOP)
		return -EINVAL;
	if (!(state & FR_STATE_LOGGING))
		fr_end_session(fr);
	fr->state = state;
	fr_work_if_due(fr);
	return 0;
}

/* As after power-on: running, with content that no other device has, so that a page that was not moved shows. */
void fr_reset(struct fr_device *fr)
{
	u64 content = get_random_u64();

	fr_end_session(fr);
	memset(fr->registers, 0, FR_REGISTERS_SIZE);
	for (unsigned long page = 0; page < fr->pages; page++)
		memset64((u64 *)(fr->memory + (page << PAGE_SHIFT)), content + page, PAGE_SIZE / sizeof(u64));
	fr->loading.begun = false;
	fr->loading.in_capture = false;
	fr->loading.total = 0;
	fr->loading.pos = 0;
	fr->loading.captures = 0;
	fr->config_size = 0;
	fr->memory_pos = 0;
	fr->start_addr = 0;
	fr->state = 0;
}

static int fr_get_bitmap(struct fr_device *fr, u64 start, u64 pages)
{
	struct fr_region *region = &fr->regions[FR_INDEX_BITMAP];
	u64 length, end;

	if (!fr_logging(fr)) {
		memset(region->data, 0, region->size);
		return 0;
	}
	if (!pages || pages > region->size * BITS_PER_BYTE || !PAGE_ALIGNED(start))
		return -EINVAL;
	length = pages << PAGE_SHIFT;
	if (check_add_overflow(start, length - 1, &end))
		return -EINVAL;
	memset(region->data, 0, DIV_ROUND_UP(pages, BITS_PER_BYTE));
	fr_take_guest_dirty(fr, start >> PAGE_SHIFT, pages, region->data);
	return 0;
}

static int fr_act(struct fr_device *fr, bool config, u32 action)
{
	if (action != FR_GET_BUFFER && action != FR_SET_BUFFER)
		return -EINVAL;
	if (action == FR_SET_BUFFER && fr->state != FR_STATE_STOP)
		return -EBUSY;
	if (config && action == FR_SET_BUFFER)
		return fr_set_config(fr);
	if (!config)
		return action == FR_GET_BUFFER ? fr_fetch(fr) : fr_take(fr);
	fr_get_config(fr);
	return 0;
}

static int fr_set_config_size(struct fr_device *fr, u64 size)
{
	if (fr->state != FR_STATE_STOP)
		return -EBUSY;
	if (size > fr->regions[FR_INDEX_CONFIG].size)
		return -ENOSPC;
	fr->config_size = size;
	return 0;
}

int fr_control_read(struct fr_device *fr, u64 offset, void *data, size_t count)
{
	const struct fr_layout *at = fr->layout;

	if (count == sizeof(u32)) {
		u32 value = 0;

		if (offset == FR_CTL_VERSION)
			value = FR_INTERFACE_VERSION;
		else if (offset == FR_CTL_CAPS)
			value = fr->type->caps;
		else if (offset != FR_CTL_STATE && offset != at->config_action && offset != at->memory_action)
			return -EINVAL;
		memcpy(data, &value, sizeof(value));
		return 0;
	}
	if (count == sizeof(u64)) {
		u64 value = 0;

		if (offset == at->config_size) {
			value = sizeof(struct fr_config);
		} else if (offset == at->memory_size) {
			if (!(fr->type->caps & FR_CAP_DEVICE_MEMORY))
				return -EOPNOTSUPP;
			value = fr_capture(fr);
		} else if (offset != at->memory_pos && offset != at->start_addr && offset != at->page_nr) {
			return -EINVAL;
		}
		memcpy(data, &value, sizeof(value));
		return 0;
	}
	return -EINVAL;
}

static int fr_write_u32(struct fr_device *fr, u64 offset, u32 value)
{
	if (offset == FR_CTL_STATE)
		return fr_set_state(fr, value);
	if (offset == fr->layout->config_action)
		return fr_act(fr, true, value);
	if (offset != fr->layout->memory_action)
		return -EINVAL;
	return fr->type->caps & FR_CAP_DEVICE_MEMORY ? fr_act(fr, false, value) : -EOPNOTSUPP;
}

static int fr_write_u64(struct fr_device *fr, u64 offset, u64 value)
{
	const struct fr_layout *at = fr->layout;

	if (offset == at->config_size)
		return fr_set_config_size(fr, value);
	if (offset == at->memory_size || offset == at->memory_pos) {
		if (!(fr->type->caps & FR_CAP_DEVICE_MEMORY))
			return -EOPNOTSUPP;
		if (offset == at->memory_size)
			return fr->state == FR_STATE_STOP ? fr_begin_capture(fr, value) : -EBUSY;
		fr->memory_pos = value;
		return 0;
	}
	if (offset != at->start_addr && offset != at->page_nr)
		return -EINVAL;
	if (!(fr->type->caps & FR_CAP_SYSTEM_MEMORY))
		return -EOPNOTSUPP;
	if (offset == at->page_nr)
		return fr_get_bitmap(fr, fr->start_addr, value);
	fr->start_addr = value;
	return 0;
}

int fr_control_write(struct fr_device *fr, u64 offset, const void *data, size_t count)
{
	u64 values[2] = {};

	if (count > sizeof(values))
		return -EINVAL;
	memcpy(values, data, count);
	if (count == sizeof(u32))
		return fr_write_u32(fr, offset, values[0]);
	if (count == sizeof(u64))
		return fr_write_u64(fr, offset, values[0]);
	/* The bitmap's range may come in one write: the first half is kept, the second triggers. */
	if (count == sizeof(values) && offset == fr->layout->start_addr) {
		int ret = fr_write_u64(fr, offset, values[0]);

		return ret ? ret : fr_write_u64(fr, fr->layout->page_nr, values[1]);
	}
	return -EINVAL;
}
