// SPDX-License-Identifier: GPL-2.0
/*
 * Captures of device memory, and the config: the source's side.
 *
 * Invariant: a page that differs from what user space has is marked in `dirty`, or belongs to a capture that is not
 * wholly fetched. A capture is a fixed list of pages, whose content is read when it is fetched: a page written meanwhile
 * is dirty again and comes with the next capture.
 */
#include <linux/bitmap.h>
#include <linux/crc32.h>
#include <linux/mm.h>
#include <linux/random.h>

#include "four_region.h"

/* All memory counts as dirty again: the next capture is the whole, and starts a stream. */
void fr_forget_captures(struct fr_device *fr)
{
	fr->saving.nonce = 0;
	fr->saving.captures = 0;
	fr->saving.size = 0;
}

u32 fr_head_crc(const struct fr_device *fr, const struct fr_head *head)
{
	u32 crc = crc32_le(~0, (const u8 *)head, offsetof(struct fr_head, crc));

	return ~crc32_le(crc, (const u8 *)(head + 1), fr->head_size - sizeof(*head));
}

static u64 fr_start(struct fr_device *fr, enum fr_kind kind)
{
	struct fr_saving *saving = &fr->saving;
	u64 pages = bitmap_weight(fr_head_bits(saving->head), fr->pages);

	if (kind == FR_WHOLE) {
		saving->nonce = get_random_u64();
		saving->captures = 0;
	}
	*saving->head = (struct fr_head){
		.magic = FR_HEAD_MAGIC,
		.kind = kind,
		.ordinal = saving->captures++,
		.nonce = saving->nonce,
		.memory = fr->type->memory,
		.pages = pages,
	};
	saving->head->crc = fr_head_crc(fr, saving->head);
	saving->size = fr_capture_size(fr, pages);
	bitmap_set(saving->unfetched, 0, DIV_ROUND_UP(saving->size, fr->type->memory_region));
	return saving->size;
}

/* The whole memory, or under LOGGING what was written since the last capture. Returns the size, 0 for nothing. */
u64 fr_capture(struct fr_device *fr)
{
	struct fr_saving *saving = &fr->saving;
	unsigned long *bits = fr_head_bits(saving->head);
	u64 chunks = DIV_ROUND_UP(saving->size, fr->type->memory_region);

	/* One that was not wholly fetched is replaced, since nobody knows what user space kept of it. */
	if (saving->size && !bitmap_empty(saving->unfetched, chunks)) {
		saving->captures--;
		for (unsigned long page = 0; page < fr->pages; page++)
			if (test_bit(page, bits))
				set_bit(page, fr->dirty);
	}
	saving->size = 0;

	/* Marks first, then mappings: what is written in between is in this capture, and what comes later is marked. */
	for (unsigned long n = 0; n < BITS_TO_LONGS(fr->pages); n++)
		bits[n] = xchg(&fr->dirty[n], 0);
	unmap_mapping_range(fr->vdev.inode->i_mapping, (loff_t)FR_INDEX_MEMORY_BAR << FR_OFFSET_SHIFT, fr->type->memory, 1);

	if (!fr_logging(fr) || !saving->captures) {
		bitmap_fill(bits, fr->pages);
		return fr_start(fr, FR_WHOLE);
	}
	return bitmap_empty(bits, fr->pages) ? 0 : fr_start(fr, FR_DIRTY);
}

/* Put the chunk at memory_pos of the last capture in the memory region. */
int fr_fetch(struct fr_device *fr)
{
	struct fr_region *region = &fr->regions[FR_INDEX_MEMORY];
	struct fr_saving *saving = &fr->saving;
	unsigned long *bits = fr_head_bits(saving->head), page;
	u64 pos = fr->memory_pos, count, done = 0;

	if (pos % region->size || pos >= saving->size)
		return -EINVAL;
	count = min(region->size, saving->size - pos);
	if (pos < fr->head_size) {
		done = min(count, fr->head_size - pos);
		memcpy(region->data, (u8 *)saving->head + pos, done);
	}
	if (done < count) {
		page = find_nth_bit(bits, fr->pages, (pos + done - fr->head_size) >> PAGE_SHIFT);
		for (; done < count; done += PAGE_SIZE) {
			memcpy(region->data + done, fr->memory + (page << PAGE_SHIFT), PAGE_SIZE);
			page = find_next_bit(bits, fr->pages, page + 1);
		}
	}
	clear_bit(pos / region->size, saving->unfetched);
	return 0;
}

u32 fr_config_crc(const struct fr_config *config)
{
	u32 crc = crc32_le(~0, (const u8 *)config, offsetof(struct fr_config, crc));

	return ~crc32_le(crc, config->content, sizeof(config->content));
}

void fr_get_config(struct fr_device *fr)
{
	struct fr_config *config = (struct fr_config *)fr->regions[FR_INDEX_CONFIG].data;

	BUILD_BUG_ON(sizeof(*config) > SZ_64K);	/* the smallest config region of any type */
	config->magic = FR_CONFIG_MAGIC;
	config->nonce = fr->saving.nonce;
	config->captures = fr->saving.captures;
	memcpy(config->content, fr->registers, FR_REGISTERS_SIZE);
	config->crc = fr_config_crc(config);
}
