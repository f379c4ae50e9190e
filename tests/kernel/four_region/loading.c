// SPDX-License-Identifier: GPL-2.0
/*
 * The target's side: captures in the order the source took them, then the config that completes them.
 *
 * Pages reach the memory as they come, so a load that was begun is finished, or begun again, or the device does not run.
 * Everything here comes from outside. User space may change a region that it has mapped at any time: what is checked is
 * therefore a copy, and page contents need no check.
 */
#include <linux/bitmap.h>
#include <linux/slab.h>

#include "four_region.h"

/* A capture of `size` bytes follows. */
int fr_begin_capture(struct fr_device *fr, u64 size)
{
	struct fr_loading *loading = &fr->loading;

	if (size > fr_capture_size(fr, fr->pages))
		return -ENOSPC;
	if (!size)	/* nothing was dirty */
		return loading->in_capture ? -EINVAL : 0;
	if (loading->in_capture || !loading->begun)
		loading->captures = 0;	/* only a fresh start will do */
	loading->begun = true;
	loading->in_capture = true;
	loading->total = size;
	loading->pos = 0;
	return 0;
}

static int fr_check_head(struct fr_device *fr)
{
	struct fr_loading *loading = &fr->loading;
	struct fr_head *head = loading->head;

	if (head->magic != FR_HEAD_MAGIC || head->zero || (head->kind != FR_WHOLE && head->kind != FR_DIRTY))
		return -EINVAL;
	if (head->memory != fr->type->memory)
		return head->memory > fr->type->memory ? -ENOSPC : -EINVAL;
	if (!head->pages || head->pages > fr->pages || fr_capture_size(fr, head->pages) != loading->total)
		return -EINVAL;
	if (head->kind == FR_WHOLE) {
		loading->captures = 0;
		return head->ordinal || head->pages != fr->pages ? -EINVAL : 0;
	}
	if (!loading->captures || head->ordinal != loading->captures || head->nonce != loading->nonce)
		return -EINVAL;
	return 0;
}

static int fr_check_bits(struct fr_device *fr)
{
	struct fr_head *head = fr->loading.head;

	if (fr_head_crc(fr, head) != head->crc)
		return -EBADMSG;
	if (bitmap_weight(fr_head_bits(head), fr->pages) != head->pages)
		return -EINVAL;
	fr->loading.next_page = find_first_bit(fr_head_bits(head), fr->pages);
	return 0;
}

static int fr_take_chunk(struct fr_device *fr, const u8 *data, u64 count)
{
	struct fr_loading *loading = &fr->loading;
	u64 part = 0;
	int ret;

	if (!loading->pos) {
		part = min(count, fr->head_size);	/* less, where it is garbage */
		memcpy(loading->head, data, part);
		ret = fr_check_head(fr);
		if (!ret)
			ret = fr_check_bits(fr);
		if (ret)
			return ret;
	}
	/* The head says how many pages there are, and that they are what is left of the total. */
	for (; part < count; part += PAGE_SIZE) {
		memcpy(fr->memory + (loading->next_page << PAGE_SHIFT), data + part, PAGE_SIZE);
		loading->next_page = find_next_bit(fr_head_bits(loading->head), fr->pages, loading->next_page + 1);
	}
	return 0;
}

/* Take what is in the memory region as the chunk at memory_pos. After a refusal, but that of a wrong position, the load
 * has to begin again.
 */
int fr_take(struct fr_device *fr)
{
	struct fr_region *region = &fr->regions[FR_INDEX_MEMORY];
	struct fr_loading *loading = &fr->loading;
	u64 count = min(region->size, loading->total - loading->pos);
	int ret;

	if (!loading->begun || !count || fr->memory_pos != loading->pos)
		return -EINVAL;
	if (count % PAGE_SIZE)
		ret = -EINVAL;
	else
		ret = fr_take_chunk(fr, region->data, count);
	if (ret) {
		loading->pos = loading->total;	/* nothing is due */
		return ret;
	}
	loading->pos += count;
	if (loading->pos == loading->total) {
		loading->in_capture = false;
		loading->nonce = loading->head->nonce;
		loading->captures++;
	}
	return 0;
}

static int fr_check_config(struct fr_device *fr, const struct fr_config *config)
{
	struct fr_loading *loading = &fr->loading;

	if (config->magic != FR_CONFIG_MAGIC)
		return -EINVAL;
	if (fr_config_crc(config) != config->crc)
		return -EBADMSG;
	if (!fr->pages)
		return config->captures || config->nonce ? -EINVAL : 0;
	if (!loading->begun || loading->in_capture)
		return -EINVAL;
	return config->captures != loading->captures || config->nonce != loading->nonce ? -EINVAL : 0;
}

/* Take what is in the config region, which completes the load. */
int fr_set_config(struct fr_device *fr)
{
	struct fr_config *config;
	int ret;

	if (fr->config_size != sizeof(*config))
		return -EINVAL;
	config = kmemdup(fr->regions[FR_INDEX_CONFIG].data, sizeof(*config), GFP_KERNEL);
	if (!config)
		return -ENOMEM;
	ret = fr_check_config(fr, config);
	if (!ret) {
		memcpy(fr->registers, config->content, FR_REGISTERS_SIZE);
		fr->loading.begun = false;
		fr->config_size = 0;
		/* The load wrote pages without marking them. */
		fr_forget_captures(fr);
	}
	kfree(config);
	return ret;
}
