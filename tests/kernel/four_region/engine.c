// SPDX-License-Identifier: GPL-2.0
/*
 * What the device does: DMA when a register is written, and a workload that keeps memory changing at a steady rate.
 *
 * It works in RUNNING only. All it writes, it writes under the lock, so nothing is written after a write of STOP has
 * returned. Guest memory is whatever is mapped for DMA where the registers point.
 */
#include <linux/bitmap.h>
#include <linux/sched/signal.h>

#include "four_region.h"

#define FR_WORK_PERIOD		(HZ / 100 ?: 1)
#define FR_WORK_MOST		4096	/* pages a period; what is due beyond that is dropped */
#define FR_WORK_STALL		(NSEC_PER_SEC / 4)	/* and so is what is older */

/* ---- guest pages that were written under LOGGING */

void fr_forget_guest(struct fr_device *fr)
{
	unsigned long index;
	void *bitmap;

	xa_for_each(&fr->guest_dirty, index, bitmap) {
		xa_erase(&fr->guest_dirty, index);
		free_page((unsigned long)bitmap);
	}
}

static int fr_mark_guest(struct fr_device *fr, u64 page)
{
	unsigned long *bitmap = xa_load(&fr->guest_dirty, page >> FR_GUEST_SHIFT);

	if (!bitmap) {
		int ret;

		bitmap = (unsigned long *)get_zeroed_page(GFP_KERNEL);
		if (!bitmap)
			return -ENOMEM;
		ret = xa_err(xa_store(&fr->guest_dirty, page >> FR_GUEST_SHIFT, bitmap, GFP_KERNEL));
		if (ret) {
			free_page((unsigned long)bitmap);
			return ret;
		}
	}
	__set_bit(page & (BIT(FR_GUEST_SHIFT) - 1), bitmap);
	return 0;
}

/* Set the bits of written pages in `into`, unless it is NULL, and clear the marks. */
void fr_take_guest_dirty(struct fr_device *fr, u64 first, u64 pages, void *into)
{
	unsigned long index, bit;
	unsigned long *bitmap;

	xa_for_each_range(&fr->guest_dirty, index, bitmap, first >> FR_GUEST_SHIFT,
			  (first + pages - 1) >> FR_GUEST_SHIFT) {
		u64 base = (u64)index << FR_GUEST_SHIFT;
		unsigned long from = first > base ? first - base : 0;
		unsigned long to = min_t(u64, first + pages - base, BIT(FR_GUEST_SHIFT));

		for (bit = find_next_bit(bitmap, to, from); bit < to; bit = find_next_bit(bitmap, to, bit + 1)) {
			__clear_bit(bit, bitmap);
			if (into)
				__set_bit_le(base + bit - first, into);
		}
	}
}

void fr_forget_guest_range(struct fr_device *fr, u64 iova, u64 length)
{
	fr_take_guest_dirty(fr, iova >> PAGE_SHIFT, DIV_ROUND_UP_ULL(length, PAGE_SIZE), NULL);
}

/* ---- single pages */

static int fr_write_guest(struct fr_device *fr, u64 iova, void *data)
{
	int ret = fr_logging(fr) && fr->type->caps & FR_CAP_SYSTEM_MEMORY ? fr_mark_guest(fr, iova >> PAGE_SHIFT) : 0;

	return ret ? ret : vfio_dma_rw(&fr->vdev, iova, data, PAGE_SIZE, true);
}

static int fr_transfer(struct fr_device *fr, u64 kick, u64 iova, u64 offset, u64 pattern)
{
	void *memory = fr->memory + offset;
	int ret = 0;

	switch (kick) {
	case FR_KICK_GUEST:
		memset64((u64 *)fr->page, pattern, PAGE_SIZE / sizeof(u64));
		return fr_write_guest(fr, iova, fr->page);
	case FR_KICK_TO_GUEST:
		return fr_write_guest(fr, iova, memory);
	case FR_KICK_FROM_GUEST:
		ret = vfio_dma_rw(&fr->vdev, iova, memory, PAGE_SIZE, false);
		break;
	case FR_KICK_DEVICE:
		memset64(memory, pattern, PAGE_SIZE / sizeof(u64));
		break;
	}
	fr_mark_memory(fr, offset, PAGE_SIZE);
	return ret;
}

static int fr_kick(struct fr_device *fr, u64 kick)
{
	u64 iova = *fr_register(fr, FR_REG_IOVA), length = *fr_register(fr, FR_REG_LENGTH);
	u64 offset = *fr_register(fr, FR_REG_OFFSET), pattern = *fr_register(fr, FR_REG_PATTERN);
	int ret;

	if (!fr_running(fr))
		return -EBUSY;
	if (kick < FR_KICK_GUEST || kick > FR_KICK_DEVICE || !length || !PAGE_ALIGNED(iova | length | offset))
		return -EINVAL;
	if (kick != FR_KICK_GUEST && (length > fr->type->memory || offset > fr->type->memory - length))
		return -EINVAL;
	if (kick != FR_KICK_DEVICE && iova + length - 1 < iova)
		return -EINVAL;
	for (u64 done = 0; done < length; done += PAGE_SIZE) {
		if (fatal_signal_pending(current))
			return -EINTR;
		ret = fr_transfer(fr, kick, iova + done, offset + done, pattern + (done >> PAGE_SHIFT));
		if (ret)
			return ret;
		++*fr_register(fr, FR_REG_WRITTEN);
	}
	return 0;
}

/* ---- workload */

static void fr_work_page(struct fr_device *fr, u64 works)
{
	u64 iova = *fr_register(fr, FR_REG_IOVA), pages = *fr_register(fr, FR_REG_LENGTH) >> PAGE_SHIFT;
	u64 stamp = *fr_register(fr, FR_REG_PATTERN) + ++*fr_register(fr, FR_REG_WRITTEN);

	memset64((u64 *)fr->page, stamp, PAGE_SIZE / sizeof(u64));
	if (works & FR_WORK_DEVICE && fr->pages) {
		u64 offset = (u64)(prandom_u32_state(&fr->random) % fr->pages) << PAGE_SHIFT;

		memcpy(fr->memory + offset, fr->page, PAGE_SIZE);
		fr_mark_memory(fr, offset, PAGE_SIZE);
	}
	if (works & FR_WORK_GUEST && pages) {
		iova += (prandom_u32_state(&fr->random) % pages) << PAGE_SHIFT;
		if (fr_write_guest(fr, iova, fr->page))
			++*fr_register(fr, FR_REG_FAILED);
	}
}

static bool fr_has_work(struct fr_device *fr)
{
	return fr->open && fr_running(fr) && *fr_register(fr, FR_REG_RATE) && *fr_register(fr, FR_REG_WORK);
}

void fr_work_if_due(struct fr_device *fr)
{
	if (fr->working || !fr_has_work(fr))
		return;
	prandom_seed_state(&fr->random, *fr_register(fr, FR_REG_PATTERN));
	fr->working = true;
	fr->worked = ktime_get();
	queue_delayed_work(system_unbound_wq, &fr->work, 0);
}

void fr_work(struct work_struct *work)
{
	struct fr_device *fr = container_of(to_delayed_work(work), struct fr_device, work);
	u64 rate, due;
	s64 passed;

	mutex_lock(&fr->lock);
	fr->working = fr_has_work(fr);
	if (fr->working) {
		rate = min_t(u64, *fr_register(fr, FR_REG_RATE), NSEC_PER_SEC);
		passed = ktime_to_ns(ktime_sub(ktime_get(), fr->worked));
		due = min(passed, FR_WORK_STALL) * rate / NSEC_PER_SEC;
		fr->worked = ktime_add_ns(fr->worked, passed < FR_WORK_STALL ? due * NSEC_PER_SEC / rate : passed);
		for (due = min(due, FR_WORK_MOST); due; due--)
			fr_work_page(fr, *fr_register(fr, FR_REG_WORK));
		queue_delayed_work(system_unbound_wq, &fr->work, FR_WORK_PERIOD);
	}
	mutex_unlock(&fr->lock);
}

/* ---- registers */

void fr_registers_read(struct fr_device *fr, u64 offset, void *data, size_t count)
{
	*fr_register(fr, FR_REG_ID) = FR_ID;
	*fr_register(fr, FR_REG_STATE) = fr->state;
	memcpy(data, fr->registers + offset, count);
}

int fr_register_write(struct fr_device *fr, u64 offset, const void *data, size_t count)
{
	u64 value;

	if (offset >= FR_SCRATCH) {
		memcpy(fr->registers + offset, data, count);
		return 0;
	}
	if (count != sizeof(value))
		return -EINVAL;
	memcpy(&value, data, count);
	switch (offset) {
	case FR_REG_KICK:
		return fr_kick(fr, value);
	case FR_REG_WORK:
		if (value & ~(FR_WORK_DEVICE | FR_WORK_GUEST))
			return -EINVAL;
		fallthrough;
	case FR_REG_IOVA:
	case FR_REG_LENGTH:
		if (offset != FR_REG_WORK && !PAGE_ALIGNED(value))
			return -EINVAL;
		fallthrough;
	case FR_REG_PATTERN:
	case FR_REG_OFFSET:
	case FR_REG_RATE:
		*fr_register(fr, offset) = value;
		fr_work_if_due(fr);
		return 0;
	default:
		return -EINVAL;
	}
}
